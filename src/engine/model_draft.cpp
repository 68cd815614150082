#include "engine/model_draft.hpp"

#include <algorithm>
#include <utility>

#include "base/fail.hpp"
#include "engine/step_clock.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

// What the draft has measured: the last times, less those before them.
class MeanSeconds {
 public:
  void note(double seconds, std::int64_t count) {
    constexpr double kWeight = 0.2;
    const double one = seconds / static_cast<double>(count);
    mean_ = mean_ == 0 ? one : mean_ + kWeight * (one - mean_);
  }
  double operator()() const noexcept { return mean_; }

 private:
  double mean_ = 0;
};

// What all texts of a draft share, and the last of them takes along.
struct DraftDevice {
  std::shared_ptr<const Model> model;
  std::unique_ptr<Backend> backend;
  MeanSeconds token_read, step;
};

class ModelText final : public DraftText {
 public:
  ModelText(std::shared_ptr<DraftDevice> device, SamplingParams sampling)
      : device_(std::move(device)), sampling_(std::move(sampling)) {}
  ~ModelText() override { give_up(); }

  void append(std::span<const TokenId> tokens) override {
    text_.insert(text_.end(), tokens.begin(), tokens.end());
    const std::int64_t vocab_size = device_->model->config().vocab_size;
    has_foreign_ids_ |= std::ranges::any_of(
        tokens, [&](TokenId token) { return token < 0 || token >= vocab_size; });
  }

  bool read() override {
    if (text_.empty()) return false;
    if (room() < 1) give_up();
    if (gave_up_) return false;
    try {
      return read_piece();
    } catch (const Error&) {
      give_up();
      return false;
    }
  }

  double seconds_to_read() const override {
    if (gave_up_ || text_.empty()) return 0;
    return static_cast<double>(text_.size() - 1 - num_right()) * device_->token_read();
  }

  // Steps that there is room for.
  std::int32_t begin_steps(std::int32_t most) {
    next_ = text_.back();
    return static_cast<std::int32_t>(std::min<std::int64_t>(most, room()));
  }
  SequenceId id() const noexcept { return id_; }
  // The next step's input.
  TokenId input() const noexcept { return next_; }
  // A step has fed input() and chosen `token`.
  void note_step(TokenId token) { fed_.push_back(std::exchange(next_, token)); }

  // No more is proposed for this text.
  void give_up() noexcept {
    gave_up_ = true;
    if (id_ < 0) return;
    try {
      backend().release_sequence(std::exchange(id_, -1));
    } catch (...) {
      // What cannot be released stays with the backend.
    }
  }

 private:
  Backend& backend() const noexcept { return *device_->backend; }

  // Of the tokens fed, how many are the text's, without its last one, which is fed by a step.
  std::size_t num_right() const {
    const std::size_t most = std::min(fed_.size(), text_.size() - 1);
    std::size_t right = right_;
    while (right < most && fed_[right] == text_[right]) ++right;
    return right;
  }

  std::int64_t room() const noexcept {
    if (gave_up_ || has_foreign_ids_) return 0;
    return backend().info().max_positions - std::ssize(text_) + 1;
  }

  // Of all but the last token, without what was proposed in vain. Whether that is all.
  bool read_piece() {
    if (id_ < 0) id_ = backend().create_sequence(sampling_);
    right_ = num_right();
    if (fed_.size() > right_) {
      backend().truncate(id_, static_cast<std::int64_t>(right_));
      fed_.resize(right_);
    }
    const std::size_t end = text_.size() - 1;
    if (right_ == end) return true;
    const auto count =
        std::min(end - right_, static_cast<std::size_t>(backend().info().prefill_chunk));
    const auto piece = std::span(text_).subspan(right_, count);
    const double start = machine_seconds();
    feed(piece);
    device_->token_read.note(machine_seconds() - start, std::ssize(piece));
    fed_.insert(fed_.end(), piece.begin(), piece.end());
    right_ = fed_.size();
    return right_ == end;
  }

  // The one token that is left when all that was proposed was right takes less time as a step.
  void feed(std::span<const TokenId> piece) const {
    if (piece.size() == 1)
      backend().decode({&id_, 1}, piece, 1, {}, {});
    else
      backend().prefill(id_, piece, {});
  }

  std::shared_ptr<DraftDevice> device_;
  SamplingParams sampling_;
  std::vector<TokenId> text_;
  std::vector<TokenId> fed_;  // what the draft's sequence holds: the text, then what it proposed
  std::size_t right_ = 0;     // of these, that are known to be the text's
  bool has_foreign_ids_ = false;
  bool gave_up_ = false;
  SequenceId id_ = -1;
  TokenId next_ = -1;
};

class ModelDraft final : public Draft {
 public:
  ModelDraft(std::shared_ptr<DraftDevice> device, std::int64_t target_vocab_size)
      : device_(std::move(device)), target_vocab_size_(target_vocab_size) {}

  std::string name() const override { return device_->model->folder().string(); }

  std::unique_ptr<DraftText> begin(const SamplingParams& sampling) override {
    return std::make_unique<ModelText>(device_, sampling_of_draft(sampling));
  }

  void propose(std::span<DraftQuery> queries) override {
    std::vector<DraftQuery*> going;
    for (DraftQuery& query : queries) {
      query.most = text_of(query).begin_steps(query.most);
      going.push_back(&query);
    }
    while (std::erase_if(going, [](const DraftQuery* query) { return left(*query) <= 0; }),
           !going.empty()) {
      std::int32_t steps = device_->backend->info().decode_ahead;
      for (const DraftQuery* query : going) steps = std::min(steps, left(*query));
      decode(going, steps);
    }
  }

  bool is_cheap() const override { return false; }
  double seconds_per_token() const override { return device_->step(); }

 private:
  static ModelText& text_of(const DraftQuery& query) {
    return static_cast<ModelText&>(*query.text);
  }

  // The same rules and the same noise, as far as the draft's vocabulary reaches.
  SamplingParams sampling_of_draft(SamplingParams sampling) const {
    const std::int64_t vocab_size = device_->model->config().vocab_size;
    const auto is_foreign = [&](TokenId token) { return token >= vocab_size; };
    std::erase_if(sampling.logit_bias,
                  [&](const TokenBias& bias) { return is_foreign(bias.token); });
    std::erase_if(sampling.suppressed_tokens, is_foreign);
    const std::int64_t drawable =
        sampling.drawable_vocab_size > 0 ? sampling.drawable_vocab_size : target_vocab_size_;
    sampling.drawable_vocab_size = std::min({drawable, target_vocab_size_, vocab_size});
    sampling.num_logprobs = -1;
    return sampling;
  }

  static std::int32_t left(const DraftQuery& query) {
    return query.most - static_cast<std::int32_t>(query.tokens.size());
  }

  // Steps of several texts. One that they fail for proposes no more.
  void decode(std::span<DraftQuery* const> going, std::int32_t steps) {
    std::vector<SequenceId> ids;
    std::vector<TokenId> inputs;
    for (const DraftQuery* query : going) {
      ids.push_back(text_of(*query).id());
      inputs.push_back(text_of(*query).input());
    }
    std::vector<SampledToken> sampled(going.size() * static_cast<std::size_t>(steps));
    const double start = machine_seconds();
    try {
      device_->backend->decode(ids, inputs, steps, sampled, {});
    } catch (const Error&) {
      if (going.size() == 1) return end(*going[0]);
      for (std::size_t i = 0; i < going.size(); ++i) decode(going.subspan(i, 1), steps);
      return;
    }
    device_->step.note(machine_seconds() - start, steps);
    for (std::size_t i = 0; i < sampled.size(); ++i) {
      DraftQuery& query = *going[i % going.size()];
      text_of(query).note_step(sampled[i].token);
      query.tokens.push_back(sampled[i].token);
    }
  }
  static void end(DraftQuery& query) {
    text_of(query).give_up();
    query.most = 0;
  }

  std::shared_ptr<DraftDevice> device_;
  std::int64_t target_vocab_size_;
};

}  // namespace

std::unique_ptr<Draft> make_model_draft(std::shared_ptr<const Model> model,
                                        std::unique_ptr<Backend> backend,
                                        std::int64_t target_vocab_size) {
  auto device =
      std::make_shared<DraftDevice>(DraftDevice{std::move(model), std::move(backend), {}, {}});
  return std::make_unique<ModelDraft>(std::move(device), target_vocab_size);
}

void require_same_vocabulary(const Model& target, const Tokenizer* target_tokenizer,
                             const Model& draft, const Tokenizer* draft_tokenizer) {
  const std::string names =
      fmt::format("draft {} does not fit {}", draft.folder().string(), target.folder().string());
  require((target_tokenizer == nullptr) == (draft_tokenizer == nullptr),
          ErrorKind::invalid_argument,
          "{}: only {} has a tokenizer.json, so that their vocabularies cannot be compared; give "
          "both the same",
          names, (target_tokenizer == nullptr ? draft : target).folder().string());
  if (target_tokenizer == nullptr) {
    require(target.config().vocab_size == draft.config().vocab_size, ErrorKind::invalid_argument,
            "{}: neither has a tokenizer.json, and their vocab_size differs: {} and {}; choose a "
            "draft with the same tokens",
            names, draft.config().vocab_size, target.config().vocab_size);
    return;
  }
  const std::int64_t shared =
      std::min(target_tokenizer->vocab_size(), draft_tokenizer->vocab_size());
  for (TokenId id = 0; id < shared; ++id) {
    const std::string_view ours = target_tokenizer->id_to_token(id);
    const std::string_view drafts = draft_tokenizer->id_to_token(id);
    require(ours == drafts, ErrorKind::invalid_argument,
            "{}: token {} is {} in the draft and {} in the model; choose a draft with the same "
            "tokens (vocabularies may be padded to different widths)",
            names, id, quote(drafts), quote(ours));
  }
}

}  // namespace clusterfusion
