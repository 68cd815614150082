#include "backend/cuda/cuda_backend.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cublas_library.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/decode/decode_timeline.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/kv_pool.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/prefill.hpp"
#include "backend/cuda/read_ceiling.hpp"
#include "backend/cuda/sampling/device_sampler.hpp"
#include "backend/cuda/stream/stream_decoder.hpp"
#include "base/fail.hpp"
#include "plan/decode_plan.hpp"
#include "sampling/adjustments.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion {
namespace cuda {
namespace {

constexpr std::int32_t kDecodeAhead = 16;
// Prompts up to this length go token by token through the decode kernel: from two tokens on, one
// pass of matrix-matrix work is quicker (Pythia-2.8B, H100: 2.9 ms for 2 to 16 tokens).
constexpr std::int64_t kStreamedPrompt = 1;
// Of one launch.
constexpr std::int64_t kMaxSteps = std::max<std::int64_t>(kDecodeAhead, kStreamedPrompt);

cudaDeviceProp device_properties() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
  return properties;
}

// What takes a look at all logits together: the decode kernel by itself knows greedy and plain
// temperature sampling.
bool needs_sampler(const SamplingParams& sampling) {
  return sampling.num_logprobs >= 0 || sampling.repetition_penalty != 1.0f ||
         (sampling.temperature > 0 &&
          (sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0));
}

struct Sequence {
  SamplingParams sampling;
  Sampler sampler;
  std::int64_t length = 0;
  std::vector<char*> pages;
};

// Checks the options, before anything is loaded. Errors: unsupported, invalid_argument.
std::int64_t longest_context(const ModelConfig& config, const BackendOptions& options) {
  require(!options.kv_dtype || *options.kv_dtype == config.dtype, ErrorKind::unsupported,
          "kv_dtype {} is not available on the GPU: its KV cache has the weights' type, {}",
          name_of(options.kv_dtype.value_or(config.dtype)), name_of(config.dtype));
  require(options.max_positions >= 0 && options.max_positions <= config.max_positions,
          ErrorKind::invalid_argument, "max_positions: expected 0 to {} (the model's), found {}",
          config.max_positions, options.max_positions);
  return options.max_positions ? options.max_positions : config.max_positions;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::shared_ptr<const Model> model, const BackendOptions& options)
      : model_(std::move(model)),
        properties_(device_properties()),
        plan_(plan::make_decode_plan(
            model_->config(), {properties_.multiProcessorCount,
                               static_cast<std::int64_t>(properties_.sharedMemPerBlockOptin)})),
        max_positions_(longest_context(model_->config(), options)),
        mode_(options.mode),
        weights_(*model_, {max_positions_, plan_.kv.page_bytes, options.load_progress}),
        pool_(plan_.kv.page_bytes),
        prefill_(model_->config(), weights_, plan_.kv, max_positions_),
        sampler_(model_->config().vocab_size, kDecodeAhead) {
    const ModelConfig& config = model_->config();
    info_.name = "cuda";
    info_.device = fmt::format("{}, {} SMs", properties_.name, properties_.multiProcessorCount);
    info_.kv_dtype = config.dtype;
    info_.kv_bytes_per_position = plan_.kv.page_bytes / kKvPagePositions;
    info_.max_positions = max_positions_;
    info_.prefill_chunk = prefill_.max_tokens();
    info_.decode_ahead = kDecodeAhead;
    prepare();
    info_.kv_pages = kv_pages(options.kv_bytes);
    // Whole pieces at the same places are the same computation.
    info_.prefix_granularity =
        info_.prefill_chunk % kKvPagePositions == 0 ? info_.prefill_chunk : 0;
  }

  ~CudaBackend() override { cudaStreamDestroy(stream_); }

  const BackendInfo& info() const noexcept override { return info_; }

  SequenceId create_sequence(const SamplingParams& sampling) override {
    sampling.validate();
    const SequenceId id = next_id_++;
    sequences_.emplace(id,
                       Sequence{sampling, Sampler(sampling, model_->config().vocab_size), 0, {}});
    return id;
  }

  SequenceId create_sequence(const SamplingParams& sampling, std::span<const TokenId> tokens,
                             std::span<const KvPageId> pages) override {
    require(std::ssize(pages) == kv_pages_of(std::ssize(tokens)), ErrorKind::invalid_argument,
            "create_sequence: expected {} pages for {} tokens, found {}",
            kv_pages_of(std::ssize(tokens)), tokens.size(), pages.size());
    const SequenceId id = create_sequence(sampling);
    Sequence& sequence = find(id);
    append(sequence, tokens);
    for (const KvPageId page : pages) {
      sequence.pages.push_back(reinterpret_cast<char*>(page));
      pool_.share(sequence.pages.back());
    }
    return id;
  }

  KvPageId hold_page(SequenceId id, std::int64_t index) override {
    char* const page = find(id).pages.at(static_cast<std::size_t>(index));
    pool_.share(page);
    return KvPageId{reinterpret_cast<std::uintptr_t>(page)};
  }
  void drop_page(KvPageId page) override { pool_.give_back(reinterpret_cast<char*>(page)); }
  std::int64_t kv_pages_in_use() const override { return pool_.in_use(); }

  SampledToken sample(SequenceId id, std::span<const float> logits) override {
    return find(id).sampler.sample(logits);
  }

  void release_sequence(SequenceId id) override {
    for (char* page : find(id).pages) pool_.give_back(page);
    sequences_.erase(id);
  }

  std::int64_t length(SequenceId id) const override {
    return const_cast<CudaBackend*>(this)->find(id).length;
  }

  void reserve(SequenceId id, std::int64_t positions) override {
    Sequence& sequence = find(id);
    require(positions <= info_.max_positions, ErrorKind::invalid_argument,
            "context: at most {} positions, {} asked for", info_.max_positions, positions);
    const auto pages = static_cast<std::size_t>(kv_pages_of(positions));
    for (std::size_t p = sequence.length / kKvPagePositions;
         p < std::min(pages, sequence.pages.size()); ++p)
      make_own(sequence.pages[p]);
    while (sequence.pages.size() < pages) sequence.pages.push_back(pool_.take());
  }

  void truncate(SequenceId id, std::int64_t length) override {
    Sequence& sequence = find(id);
    require(length >= 0 && length <= sequence.length, ErrorKind::invalid_argument,
            "truncate: expected a length of 0 to {}, found {}", sequence.length, length);
    sequence.length = length;
    sequence.sampler.truncate(length);
  }

  void prefill(SequenceId id, std::span<const TokenId> tokens,
               const PrefillOutput& output) override {
    Sequence& sequence = find(id);
    check_prefill(sequence, tokens, output);
    const std::int64_t old_length = sequence.length;
    reserve(id, old_length + std::ssize(tokens));
    try {
      for (std::size_t begin = 0; begin < tokens.size();) {
        const std::size_t count =
            std::min<std::size_t>(tokens.size() - begin, prefill_.max_tokens());
        prefill_piece(sequence, tokens.subspan(begin, count),
                      output_of_piece(output, tokens.size(), begin, count));
        begin += count;
      }
    } catch (...) {
      sequence.length = old_length;
      sequence.sampler.truncate(old_length);
      throw;
    }
    if (output.sampled)
      *output.sampled = sequence.sampler.sample(
          output.last_logits.empty() ? std::span<const float>(host_logits_) : output.last_logits);
  }

  void decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
              std::int32_t steps, std::span<SampledToken> sampled,
              std::span<float> logits) override {
    check_decode(sequences, inputs, steps, sampled, logits);
    for (std::size_t b = 0; b < sequences.size(); ++b)
      reserve(sequences[b], find(sequences[b]).length + steps);
    if (!stream_decoder_) return decode_one_by_one(sequences, inputs, steps, sampled, logits);
    std::vector<std::size_t> together;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      if (needs_host(find(sequences[b]).sampling))
        decode_row_with_host({sequences, inputs, sampled, logits, std::span(&b, 1), steps});
      else
        together.push_back(b);
    }
    constexpr auto most = static_cast<std::size_t>(plan::kMaxRows);
    for (std::size_t first = 0; first < together.size(); first += most) {
      const std::size_t count = std::min(most, together.size() - first);
      decode_rows(
          {sequences, inputs, sampled, logits, std::span(together).subspan(first, count), steps});
    }
  }

  std::vector<TimelineEvent> record_timeline(SequenceId id, TokenId input) override {
    check_decode(std::span(&id, 1), std::span(&input, 1), 1, {}, {});
    Sequence& sequence = find(id);
    reserve(id, sequence.length + 1);
    const auto sms = static_cast<std::size_t>(properties_.multiProcessorCount);
    const bool of_rows = stream_decoder_.has_value();
    constexpr static std::size_t kFirst = 0;
    std::vector<std::uint64_t> times(sms * (model_->config().num_layers + 1) *
                                     timeline_points(of_rows));
    const auto bytes = static_cast<std::int64_t>(times.size() * sizeof(times[0]));
    const DeviceMemory memory(bytes, "the timeline");
    check(cudaMemsetAsync(memory.as<>(), 0, bytes, stream_), "clearing the timeline");
    const auto record = [&](std::uint64_t* to) {
      params_.timeline = to;
      if (of_rows) stream_decoder_->record_timeline(to);
    };
    record(memory.as<std::uint64_t>());
    try {
      if (of_rows)
        decode_rows({std::span(&id, 1), std::span(&input, 1), {}, {}, std::span(&kFirst, 1), 1});
      else
        run(sequence, std::span(&input, 1), 1, 0, false, 0.0f);
    } catch (...) {
      record(nullptr);
      throw;
    }
    record(nullptr);
    check(cudaMemcpy(times.data(), memory.as<>(), bytes, cudaMemcpyDeviceToHost),
          "fetching the timeline");
    return timeline_events(times, properties_.multiProcessorCount,
                           static_cast<std::int32_t>(model_->config().num_layers), of_rows);
  }

  double measure_read_ceiling() override {
    return cuda::measure_read_ceiling(weights_.weights().as<>(), weights_.weights().bytes());
  }

 private:
  void prepare() {
    const ModelConfig& config = model_->config();
    if (mode_ == DecodeMode::throughput && StreamDecoder::supports(config, plan_.kv, properties_))
      stream_decoder_.emplace(config, plan_.kv, weights_, properties_, max_positions_,
                              kDecodeAhead);
    const int fragments = fragments_needed(config, plan_);
    kernel_ = find_decode_kernel(config.dtype, fragments, static_cast<int>(config.head_dim));
    prepare_kernel(kernel_, plan_, properties_);
    params_ = stream_params(config, plan_, properties_.multiProcessorCount,
                            fragments <= kFragmentsOfHalfProducts);
    read_more_late(params_);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
    allocate_scratch();
    point_at_weights();
  }

  // By default nine tenths of what the weights and scratch memory have left.
  std::int64_t kv_pages(std::int64_t bytes) const {
    const std::int64_t page_bytes = plan_.kv.page_bytes;
    if (bytes == 0) {
      std::size_t free = 0, total = 0;
      check(cudaMemGetInfo(&free, &total), "asking for free memory");
      return static_cast<std::int64_t>(free) / 10 * 9 / page_bytes;
    }
    require(bytes >= page_bytes, ErrorKind::invalid_argument,
            "kv_bytes: expected at least {}, one page of {} positions, or 0 for nine tenths of the "
            "memory that is left; found {}",
            page_bytes, kKvPagePositions, bytes);
    return bytes / page_bytes;
  }

  // Replaces a page that others have too by a copy.
  void make_own(char*& page) {
    if (!pool_.is_shared(page)) return;
    char* const own = pool_.take();
    check(cudaMemcpyAsync(own, page, plan_.kv.page_bytes, cudaMemcpyDeviceToDevice, stream_),
          "copying a page of the KV cache");
    pool_.give_back(page);
    page = own;
  }

  void allocate_scratch() {
    const ModelConfig& config = model_->config();
    const std::int64_t phases = num_phases(config.num_layers, config.parallel_residual);
    counters_ = DeviceMemory((kMaxSteps * phases + 1) * 4, "counters");
    params_.tickets = counters_.as<std::uint32_t>();
    params_.arrivals = params_.tickets + kMaxSteps * phases;
    lamport_ = DeviceMemory(std::int64_t{kLamportSets} * params_.layout.bytes, "Lamport buffers");
    params_.lamport = lamport_.as<>();
    logits_ = DeviceMemory(kMaxSteps * config.vocab_size * 4, "logits");
    host_logits_.resize(config.vocab_size);
    tokens_ = DeviceMemory(kMaxSteps * 4 * 2, "tokens");
    const std::int64_t pages = info_.max_positions / kKvPagePositions + 1;
    page_table_ = DeviceMemory(pages * sizeof(char*), "the page table");
    params_.kv_pages = page_table_.as<char*>();
    params_.given_tokens = tokens_.as<std::int32_t>();
    params_.chosen = tokens_.as<std::int32_t>() + kMaxSteps;
    host_chosen_.resize(kMaxSteps);
  }

  void point_at_weights() {
    params_.first_layer = weights_.layers().front();
    params_.layer_stride = weights_.layer_stride();
    params_.embedding = weights_.embedding();
    params_.lm_head_weight = weights_.lm_head();
    params_.final_norm_weight = weights_.final_norm_weight();
    params_.final_norm_bias = weights_.final_norm_bias();
    params_.rotary = weights_.rotary();
  }

  Sequence& find(SequenceId id) {
    const auto found = sequences_.find(id);
    require(found != sequences_.end(), ErrorKind::out_of_range, "there is no sequence {}", id);
    return found->second;
  }

  void check_tokens(std::span<const TokenId> tokens) const {
    const std::int64_t vocab = model_->config().vocab_size;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      require(tokens[i] >= 0 && tokens[i] < vocab, ErrorKind::out_of_range,
              "token {}: expected an id of 0 to {}, found {}", i, vocab - 1, tokens[i]);
  }

  void check_decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                    std::int32_t steps, std::span<const SampledToken> sampled,
                    std::span<const float> logits) {
    const std::size_t batch = sequences.size();
    const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
    require(batch > 0 && inputs.size() == batch, ErrorKind::invalid_argument,
            "decode: expected one input for each of at least one sequence, found {} for {}",
            inputs.size(), batch);
    require(steps >= 1 && steps <= kDecodeAhead, ErrorKind::invalid_argument,
            "decode: expected 1 to {} steps, found {}", kDecodeAhead, steps);
    require(sampled.size() == batch * steps || (sampled.empty() && steps == 1),
            ErrorKind::invalid_argument, "decode: expected room for {} tokens, found {}",
            batch * steps, sampled.size());
    require(logits.empty() || logits.size() == batch * vocab, ErrorKind::invalid_argument,
            "decode: expected room for {} logits, found {}", batch * vocab, logits.size());
    check_tokens(inputs);
    for (std::size_t b = 0; b < batch; ++b) {
      const Sequence& sequence = find(sequences[b]);
      require(sequence.length + steps <= info_.max_positions, ErrorKind::invalid_argument,
              "context full: sequence {} holds {} positions and {} more are wanted, at most {}",
              sequences[b], sequence.length, steps, info_.max_positions);
      require(
          std::find(sequences.begin() + b + 1, sequences.end(), sequences[b]) == sequences.end(),
          ErrorKind::invalid_argument, "decode: sequence {} appears twice in one batch",
          sequences[b]);
    }
  }

  void check_prefill(const Sequence& sequence, std::span<const TokenId> tokens,
                     const PrefillOutput& output) const {
    require(!tokens.empty(), ErrorKind::invalid_argument, "prefill: expected at least one token");
    check_tokens(tokens);
    const auto count = static_cast<std::int64_t>(tokens.size());
    const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
    require(sequence.length + count <= info_.max_positions, ErrorKind::invalid_argument,
            "context full: {} positions held and {} more wanted, at most {}", sequence.length,
            count, info_.max_positions);
    require(output.all_logits.empty() || output.all_logits.size() == tokens.size() * vocab,
            ErrorKind::invalid_argument, "prefill: expected room for {} logits, found {}",
            tokens.size() * vocab, output.all_logits.size());
    require(output.last_logits.empty() || output.last_logits.size() == vocab,
            ErrorKind::invalid_argument, "prefill: expected room for {} last logits, found {}",
            vocab, output.last_logits.size());
    require(output.targets.size() == output.target_logprobs.size() &&
                (output.targets.empty() || output.targets.size() == tokens.size()),
            ErrorKind::invalid_argument,
            "prefill: expected {} targets and log-probabilities or none, found {} and {}",
            tokens.size(), output.targets.size(), output.target_logprobs.size());
    for (std::size_t i = 0; i < output.targets.size(); ++i)
      require(output.targets[i] >= -1 && output.targets[i] < static_cast<TokenId>(vocab),
              ErrorKind::out_of_range, "target {}: expected an id of 0 to {}, or -1, found {}", i,
              vocab - 1, output.targets[i]);
  }

  // What tokens [begin, begin + count) of `total` are to give. The last piece brings the last
  // logits to host_logits_ if anybody needs them.
  PrefillOutput output_of_piece(const PrefillOutput& output, std::size_t total, std::size_t begin,
                                std::size_t count) {
    const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
    PrefillOutput piece;
    if (!output.all_logits.empty())
      piece.all_logits = output.all_logits.subspan(begin * vocab, count * vocab);
    if (!output.targets.empty()) {
      piece.targets = output.targets.subspan(begin, count);
      piece.target_logprobs = output.target_logprobs.subspan(begin, count);
    }
    if (begin + count < total) return piece;
    piece.last_logits = output.last_logits;
    if (output.sampled && piece.last_logits.empty()) piece.last_logits = host_logits_;
    return piece;
  }

  // At most prefill_.max_tokens() of a prompt; a few go quicker one by one.
  void prefill_piece(Sequence& sequence, std::span<const TokenId> tokens,
                     const PrefillOutput& output) {
    if (std::ssize(tokens) <= kStreamedPrompt) {
      stream_prompt(sequence, tokens, output);
      return;
    }
    prefill_.run(tokens, sequence.length, sequence.pages, output, stream_);
    sequence.length += std::ssize(tokens);
    sequence.sampler.append(tokens);
  }

  // Token by token through the decode kernel.
  void stream_prompt(Sequence& sequence, std::span<const TokenId> tokens,
                     const PrefillOutput& output) {
    const std::int64_t count = std::ssize(tokens);
    const std::int64_t vocab = model_->config().vocab_size;
    const bool every = !output.all_logits.empty() || !output.targets.empty();
    const std::int64_t first_scored = every ? 0 : output.last_logits.empty() ? count : count - 1;
    run(sequence, tokens, count, first_scored, true, 0.0f);
    for (std::int64_t step = first_scored; step < count; ++step) {
      if (!output.all_logits.empty())
        copy_logits(step - first_scored, output.all_logits.subspan(step * vocab, vocab));
      if (output.targets.empty() || output.targets[step] < 0) continue;
      copy_logits(step - first_scored, host_logits_);
      output.target_logprobs[step] = log_probability(host_logits_, output.targets[step]);
    }
    if (!output.last_logits.empty()) copy_logits(count - 1 - first_scored, output.last_logits);
  }

  // `steps` steps of one sequence in one launch: the first inputs are `given`, later ones what was
  // chosen before. Errors: non_finite, with the sequence as it was.
  void run(Sequence& sequence, std::span<const TokenId> given, std::int64_t steps,
           std::int64_t first_scored, bool want_logits, float temperature) {
    send(sequence, given);
    params_.first_position = static_cast<std::int32_t>(sequence.length);
    params_.steps = static_cast<std::int32_t>(steps);
    params_.given_count = static_cast<std::int32_t>(given.size());
    params_.first_scored_step = static_cast<std::int32_t>(first_scored);
    params_.logits = want_logits ? logits_.as<float>() : nullptr;
    params_.temperature = temperature;
    params_.seed = sequence.sampling.seed;
    params_.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
    launch(params_);
    wait(sequence.length, steps, first_scored);
    append(sequence, given);
    // Inputs that the device chose for itself.
    append(sequence,
           std::span<const TokenId>(host_chosen_).subspan(given.size() - 1, steps - given.size()));
  }

  std::int32_t drawable_vocab_size(const SamplingParams& sampling) const {
    const std::int64_t all = model_->config().vocab_size;
    const std::int64_t wanted = sampling.drawable_vocab_size;
    return static_cast<std::int32_t>(wanted > 0 ? std::min(wanted, all) : all);
  }

  void send(const Sequence& sequence, std::span<const TokenId> given) {
    check(cudaMemcpyAsync(tokens_.as<>(), given.data(), given.size_bytes(), cudaMemcpyHostToDevice,
                          stream_),
          "sending tokens");
    check(cudaMemcpyAsync(page_table_.as<>(), sequence.pages.data(),
                          sequence.pages.size() * sizeof(char*), cudaMemcpyHostToDevice, stream_),
          "sending the page table");
  }

  void launch(const DecodeParams& params) {
    check(cudaMemsetAsync(counters_.as<>(), 0, counters_.bytes(), stream_), "clearing counters");
    check(cudaMemsetAsync(lamport_.as<>(), 0xff, lamport_.bytes(), stream_),
          "clearing Lamport buffers");
    launch_decode(kernel_, params, properties_.multiProcessorCount, plan_.shared_bytes, stream_);
  }

  // For `steps` steps from `first_position` on, and what they chose. Errors: non_finite.
  void wait(std::int64_t first_position, std::int64_t steps, std::int64_t first_scored) {
    check(cudaMemcpyAsync(host_chosen_.data(), params_.chosen, steps * 4, cudaMemcpyDeviceToHost,
                          stream_),
          "fetching tokens");
    check(cudaStreamSynchronize(stream_), "running the decode kernel");
    for (std::int64_t step = first_scored; step < steps; ++step)
      require_finite(host_chosen_[step], first_position + step);
  }

  static void append(Sequence& sequence, std::span<const TokenId> inputs) {
    sequence.length += std::ssize(inputs);
    sequence.sampler.append(inputs);
  }

  void copy_logits(std::int64_t row, std::span<float> to) {
    check(cudaMemcpy(to.data(), logits_.as<float>() + row * static_cast<std::int64_t>(to.size()),
                     to.size_bytes(), cudaMemcpyDeviceToHost),
          "fetching logits");
  }

  // Some sequences of a decode(), by their numbers in the batch.
  struct DecodeCall {
    std::span<const SequenceId> sequences;
    std::span<const TokenId> inputs;
    std::span<SampledToken> sampled;
    std::span<float> logits;
    std::span<const std::size_t> rows;
    std::int32_t steps;
    std::size_t count() const { return rows.size(); }
    SequenceId sequence(std::size_t row) const { return sequences[rows[row]]; }
    TokenId input(std::size_t row) const { return inputs[rows[row]]; }
    SampledToken* room(std::int32_t step, std::size_t row) const {
      return sampled.empty() ? nullptr : &sampled[step * sequences.size() + rows[row]];
    }
  };

  DecodeRow row_of(const Sequence& sequence, TokenId input, bool chooses) const {
    return {.position = sequence.length,
            .input = input,
            .temperature = chooses ? sequence.sampling.temperature : 0.0f,
            .seed = sequence.sampling.seed,
            .drawable_vocab_size = drawable_vocab_size(sequence.sampling),
            .pages = sequence.pages};
  }

  // All in the same launches. Errors: non_finite, with the sequences as they were.
  void decode_rows(const DecodeCall& call) {
    std::vector<DecodeRow> rows;
    std::vector<std::size_t> filtered;  // rows whose tokens the sampler chooses
    for (std::size_t row = 0; row < call.count(); ++row) {
      const Sequence& sequence = find(call.sequence(row));
      const bool filters = needs_sampler(sequence.sampling);
      if (filters) filtered.push_back(row);
      rows.push_back(row_of(sequence, call.input(row), !filters));
    }
    if (filtered.empty())
      stream_decoder_->enqueue(rows, call.steps, !call.logits.empty(), stream_);
    else
      enqueue_with_samplers(call, rows, filtered);
    take_chosen(call, filtered);
    fetch_row_logits(call);
  }
  void fetch_row_logits(const DecodeCall& call) {
    const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
    for (std::size_t row = 0; row < call.count() && !call.logits.empty(); ++row)
      check(cudaMemcpy(call.logits.data() + call.rows[row] * vocab, stream_decoder_->logits(row),
                       vocab * sizeof(float), cudaMemcpyDeviceToHost),
            "fetching logits");
  }

  // One sequence, step by step: the host chooses its tokens, for what the device does not know.
  void decode_row_with_host(const DecodeCall& call) {
    Sequence& sequence = find(call.sequence(0));
    TokenId input = call.input(0);
    for (std::int32_t step = 0; step < call.steps; ++step) {
      const DecodeRow row = row_of(sequence, input, false);
      stream_decoder_->enqueue(std::span(&row, 1), 1, true, stream_);
      std::int32_t chosen = 0;
      check(cudaMemcpyAsync(&chosen, stream_decoder_->chosen(), sizeof(chosen),
                            cudaMemcpyDeviceToHost, stream_),
            "fetching tokens");
      check(cudaStreamSynchronize(stream_), "running the streaming kernel");
      require_finite(chosen, sequence.length);
      append(sequence, std::span(&input, 1));
      SampledToken* room = call.room(step, 0);
      if (room == nullptr) continue;
      check(cudaMemcpy(host_logits_.data(), stream_decoder_->logits(0),
                       host_logits_.size() * sizeof(float), cudaMemcpyDeviceToHost),
            "fetching logits");
      *room = sequence.sampler.sample(host_logits_);
      input = room->token;
    }
    fetch_row_logits(call);
  }

  static void require_finite(std::int32_t chosen, std::int64_t position) {
    require(chosen >= 0, ErrorKind::non_finite,
            "the logits after position {} are not finite: the checkpoint holds NaN or infinity, "
            "or an activation overflowed",
            position);
  }

  // A launch for each step, and behind it the samplers of the rows that have one, which leave the
  // next step's inputs.
  void enqueue_with_samplers(const DecodeCall& call, std::vector<DecodeRow> rows,
                             std::span<const std::size_t> filtered) {
    while (row_samplers_.size() < filtered.size())
      row_samplers_.emplace_back(model_->config().vocab_size, kDecodeAhead);
    for (std::size_t i = 0; i < filtered.size(); ++i) {
      const Sequence& sequence = find(call.sequence(filtered[i]));
      const std::span<const TokenId> before = sequence.sampler.tokens();
      std::vector<TokenId> tokens(before.begin(), before.end());
      tokens.push_back(call.input(filtered[i]));
      row_samplers_[i].begin(sequence.sampling, tokens, sequence.length + 1, stream_);
    }
    std::vector<const TokenId*> inputs(call.count(), nullptr);
    for (std::int32_t step = 0; step < call.steps; ++step) {
      stream_decoder_->enqueue_step(rows, step, inputs, stream_);
      for (std::size_t row = 0; row < call.count(); ++row) {
        inputs[row] = stream_decoder_->chosen(step) + row;
        ++rows[row].position;
      }
      for (std::size_t i = 0; i < filtered.size(); ++i)
        inputs[filtered[i]] =
            row_samplers_[i].choose(stream_decoder_->logits(filtered[i]), stream_);
    }
    for (std::size_t i = 0; i < filtered.size(); ++i) row_samplers_[i].fetch(stream_);
  }

  // Waits for what was enqueued and appends it to the sequences. Errors: non_finite.
  void take_chosen(const DecodeCall& call, std::span<const std::size_t> filtered) {
    const bool in_series = !filtered.empty();
    const std::size_t stride = in_series ? plan::kMaxRows : call.count();
    std::vector<std::int32_t> chosen(call.steps * stride);
    check(cudaMemcpyAsync(chosen.data(), stream_decoder_->chosen(),
                          chosen.size() * sizeof(std::int32_t), cudaMemcpyDeviceToHost, stream_),
          "fetching tokens");
    check(cudaStreamSynchronize(stream_), "running the streaming kernel");
    for (std::int32_t step = 0; step < call.steps; ++step)
      for (std::size_t row = 0; row < call.count(); ++row)
        require_finite(chosen[step * stride + row], find(call.sequence(row)).length + step);
    std::size_t sampler = 0;
    for (std::size_t row = 0; row < call.count(); ++row) {
      const bool filters = sampler < filtered.size() && filtered[sampler] == row;
      Sequence& sequence = find(call.sequence(row));
      TokenId input = call.input(row);
      for (std::int32_t step = 0; step < call.steps; ++step) {
        append(sequence, std::span(&input, 1));
        SampledToken token{chosen[step * stride + row], 0.0f, {}};
        if (filters) token = row_samplers_[sampler].chosen(step);
        input = token.token;
        if (SampledToken* room = call.room(step, row)) *room = std::move(token);
      }
      sampler += filters;
    }
  }

  // Where the streaming kernel has only one row.
  void decode_one_by_one(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                         std::int32_t steps, std::span<SampledToken> sampled,
                         std::span<float> logits) {
    const std::size_t batch = sequences.size();
    const std::int64_t vocab = model_->config().vocab_size;
    for (std::size_t b = 0; b < batch; ++b) {
      Sequence& sequence = find(sequences[b]);
      const std::span<float> wanted = logits.empty() ? logits : logits.subspan(b * vocab, vocab);
      if (needs_host(sequence.sampling))
        decode_with_host(sequence, inputs[b], steps, sampled, b, batch, wanted);
      else if (needs_sampler(sequence.sampling))
        decode_with_sampler(sequence, inputs[b], steps, sampled, b, batch, wanted);
      else
        decode_in_one_launch(sequence, inputs[b], steps, sampled, b, batch, wanted);
    }
  }

  void decode_in_one_launch(Sequence& sequence, TokenId input, std::int32_t steps,
                            std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                            std::span<float> logits) {
    run(sequence, std::span(&input, 1), steps, 0, !logits.empty(), sequence.sampling.temperature);
    for (std::int32_t step = 0; !sampled.empty() && step < steps; ++step)
      sampled[step * batch + b] = SampledToken{host_chosen_[step], 0.0f, {}};
    if (!logits.empty()) copy_logits(steps - 1, logits);
  }

  // A launch for each step, whose logits come to the host, where the token is chosen: for what the
  // device does not know.
  void decode_with_host(Sequence& sequence, TokenId input, std::int32_t steps,
                        std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                        std::span<float> logits) {
    for (std::int32_t step = 0; step < steps; ++step) {
      run(sequence, std::span(&input, 1), 1, 0, true, 0.0f);
      copy_logits(0, host_logits_);
      if (sampled.empty()) continue;
      SampledToken token = sequence.sampler.sample(host_logits_);
      input = token.token;
      sampled[step * batch + b] = std::move(token);
    }
    if (!logits.empty()) std::ranges::copy(host_logits_, logits.begin());
  }

  // A launch for each step, and behind it the sampler's, which takes the step's logits and leaves
  // the next step's input; the host waits for the last.
  void decode_with_sampler(Sequence& sequence, TokenId input, std::int32_t steps,
                           std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                           std::span<float> logits) {
    const std::span<const TokenId> before = sequence.sampler.tokens();
    std::vector<TokenId> tokens(before.begin(), before.end());
    tokens.push_back(input);
    sampler_.begin(sequence.sampling, tokens, sequence.length + 1, stream_);
    send(sequence, std::span(&input, 1));
    DecodeParams params = params_;
    params.steps = 1;
    params.given_count = 1;
    params.first_scored_step = 0;
    params.logits = logits_.as<float>();
    params.temperature = 0.0f;
    params.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
    for (std::int32_t step = 0; step < steps; ++step) {
      params.first_position = static_cast<std::int32_t>(sequence.length) + step;
      params.chosen = params_.chosen + step;  // -1 if the logits are not finite
      launch(params);
      params.given_tokens = sampler_.choose(logits_.as<float>(), stream_);
    }
    sampler_.fetch(stream_);
    wait(sequence.length, steps, 0);
    for (std::int32_t step = 0; step < steps; ++step) {
      SampledToken token = sampler_.chosen(step);
      append(sequence, std::span(&input, 1));
      input = token.token;
      if (!sampled.empty()) sampled[step * batch + b] = std::move(token);
    }
    if (!logits.empty()) copy_logits(0, logits);
  }

  std::shared_ptr<const Model> model_;
  cudaDeviceProp properties_;
  plan::DecodePlan plan_;
  std::int64_t max_positions_;
  DecodeMode mode_;
  DeviceModel weights_;
  KvPool pool_;
  Prefill prefill_;
  DeviceSampler sampler_;
  std::deque<DeviceSampler> row_samplers_;
  std::optional<StreamDecoder> stream_decoder_;
  BackendInfo info_;
  DeviceMemory counters_, lamport_, logits_, tokens_, page_table_;
  std::vector<float> host_logits_;
  std::vector<std::int32_t> host_chosen_;
  DecodeParams params_{};
  const void* kernel_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
};

}  // namespace
}  // namespace cuda

std::string cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    cudaGetLastError();
    return "no NVIDIA GPU with a driver for CUDA 13";
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fmt::format("the NVIDIA GPU cannot be used: {}", cudaGetErrorString(error));
  }
  if (count == 0) return "no NVIDIA GPU found";
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return "the NVIDIA GPU does not answer";
  if (!cuda::has_kernels_for(properties))
    return fmt::format(
        "{} has compute capability {}.{}; this build runs on 9.0 (Hopper) and 12.0 (Blackwell)",
        properties.name, properties.major, properties.minor);
  return cuda::cublas_unavailable_reason();
}

std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model,
                                           const BackendOptions& options) {
  const std::string reason = cuda_unavailable_reason();
  require(reason.empty(), ErrorKind::unsupported, "device \"cuda\": {}; use device \"cpu\"",
          reason);
  return std::make_unique<cuda::CudaBackend>(std::move(model), options);
}

}  // namespace clusterfusion
