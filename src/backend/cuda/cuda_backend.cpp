#include "backend/cuda/cuda_backend.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/decode/timeline.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/device_tensor.hpp"
#include "backend/cuda/gemm/gemm_decoder.hpp"
#include "backend/cuda/interventions/device_interventions.hpp"
#include "backend/cuda/kv_pool.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/prefill.hpp"
#include "backend/cuda/read_ceiling.hpp"
#include "backend/cuda/sampling/device_sampler.hpp"
#include "backend/cuda/stream/stream_decoder.hpp"
#include "backend/sequences.hpp"
#include "base/fail.hpp"
#include "plan/decode_plan.hpp"
#include "plan/qkv_rows.hpp"
#include "sampling/adjustments.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion {
namespace cuda {
namespace {

// A pass of so many tokens takes half as long again as one of a single token.
constexpr std::int64_t kLeastPiece = 256;

// What takes a look at all logits together: the decode kernel by itself knows greedy and plain
// temperature sampling.
bool needs_sampler(const SamplingParams& sampling) {
  return sampling.num_logprobs >= 0 || sampling.repetition_penalty != 1.0f ||
         (sampling.temperature > 0 &&
          (sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0));
}

struct Sequence : PagedSequence<char*> {
  using PagedSequence::PagedSequence;

  // Of the next `steps` decode steps, how many may share a launch.
  std::int32_t steps_alike(std::int32_t steps) const {
    return interventions != nullptr && length < interventions->steered_positions() ? 1 : steps;
  }

  std::shared_ptr<DeviceInterventions> interventions;
};

// Checks the options, before anything is loaded. Errors: unsupported, invalid_argument.
std::int64_t checked_context(const ModelConfig& config, const BackendOptions& options) {
  const DType kv_dtype = options.kv_dtype.value_or(config.dtype);
  require(kv_dtype == config.dtype || kv_dtype == DType::float32, ErrorKind::unsupported,
          "kv_dtype {} is not available on the GPU for this model: its KV cache has the weights' "
          "type, {}, or float32; leave kv_dtype out, or use device \"cpu\"",
          name_of(kv_dtype), name_of(config.dtype));
  return longest_context(config, options.max_positions);
}

// The model as it will lie on the device. Errors: unsupported (a layer that nothing here computes).
ModelConfig config_on_device(const ModelConfig& config) {
  const std::string uncomputed = plan::uncomputed_because(config);
  require(
      uncomputed.empty(), ErrorKind::unsupported,
      "models of type {} do not run on a GPU yet, because nothing there computes {}; use device "
      "\"cpu\"",
      config.model_type, uncomputed);
  return plan::with_gathered_qkv(config);
}

// Why no streaming kernel decodes the model; empty if one does. What the kernels of many rows do
// not take is decoded by layers in mode `throughput`, where a batch reads the weights once.
std::string unstreamed_because(const ModelConfig& config, const cudaDeviceProp& properties,
                               const BackendOptions& options) {
  if (options.kv_dtype == DType::float32) return "a float32 KV cache";
  const std::string unstreamed = plan::unstreamed_because(config, limits_of(properties));
  const bool in_batches = options.mode == DecodeMode::throughput;
  return unstreamed.empty() && in_batches ? plan::unbatched_because(config) : unstreamed;
}

// The decode kernel's plan; without stages for a model that it does not take. Errors:
// unsupported (head size).
plan::DecodePlan decode_plan_of(const ModelConfig& config, const cudaDeviceProp& properties,
                                const BackendOptions& options, bool streams) {
  if (streams) return plan::make_decode_plan(config, limits_of(properties));
  plan::DecodePlan plan;
  plan.kv = plan::make_page_plan(config, options.kv_dtype.value_or(config.dtype));
  return plan;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::shared_ptr<const Model> model, const BackendOptions& options)
      : model_(std::move(model)),
        config_(config_on_device(model_->config())),
        properties_(device_properties()),
        unstreamed_(unstreamed_because(config_, properties_, options)),
        plan_(decode_plan_of(config_, properties_, options, unstreamed_.empty())),
        max_positions_(checked_context(config_, options)),
        mode_(options.mode),
        weights_(*model_, {max_positions_, plan_.kv.page_bytes, options.load_progress}),
        pool_(plan_.kv.page_bytes),
        prefill_(config_, weights_, plan_.kv, max_positions_,
                 prefill_budget(static_cast<std::int64_t>(properties_.totalGlobalMem))),
        interventions_(config_, weights_),
        sampler_(config_.vocab_size, kStepsOfLaunch),
        sequences_(config_, info_) {
    info_.name = "cuda";
    info_.device = fmt::format("{}, {} SMs", properties_.name, properties_.multiProcessorCount);
    info_.kv_dtype = plan_.kv.dtype;
    info_.kv_bytes_per_position = plan_.kv.page_bytes / kKvPagePositions;
    info_.max_positions = max_positions_;
    info_.prefill_chunk = prefill_.max_tokens();
    info_.least_piece = std::min(kLeastPiece, prefill_.max_tokens());
    info_.decode_ahead = kStepsOfLaunch;
    prepare();
    if (!unstreamed_.empty()) info_.device += fmt::format(", {} ({})", path(), unstreamed_);
    if (decodes_rows()) info_.verify_rows = static_cast<std::int32_t>(max_rows());
    info_.kv_pages = kv_pages(options.kv_bytes);
    info_.arithmetic = fmt::format("{}, {} SMs, mode {}", properties_.name,
                                   properties_.multiProcessorCount, name_of(mode_));
  }

  ~CudaBackend() override { cudaStreamDestroy(stream_); }

  const BackendInfo& info() const noexcept override { return info_; }

  SequenceId create_sequence(const SamplingParams& sampling) override {
    return sequences_.create(sampling);
  }

  SequenceId create_sequence(const SamplingParams& sampling, std::span<const TokenId> tokens,
                             std::span<const KvPageId> pages,
                             std::shared_ptr<const Interventions> interventions) override {
    sequences_.check.pages(tokens, pages);
    std::shared_ptr<DeviceInterventions> on_device =
        interventions_.on_device(interventions, stream_);
    const SequenceId id = create_sequence(sampling);
    Sequence& sequence = find(id);
    sequence.interventions = std::move(on_device);
    sequence.append(tokens);
    for (const KvPageId page : pages) {
      sequence.pages.push_back(reinterpret_cast<char*>(page));
      pool_.share(sequence.pages.back());
    }
    return id;
  }

  void intervene(SequenceId id, std::shared_ptr<const Interventions> interventions) override {
    Sequence& sequence = find(id);
    sequences_.check.intervene(id, sequence);
    sequence.interventions = interventions_.on_device(interventions, stream_);
  }

  std::shared_ptr<DLTensor> allocate_activation(std::int64_t tokens, std::int64_t hidden) override {
    return make_device_tensor(tokens, hidden);
  }

  KvPageId hold_page(SequenceId id, std::int64_t index) override {
    char* const page = find(id).pages.at(static_cast<std::size_t>(index));
    pool_.share(page);
    return KvPageId{reinterpret_cast<std::uintptr_t>(page)};
  }
  void drop_page(KvPageId page) override { pool_.give_back(reinterpret_cast<char*>(page)); }
  void read_page(KvPageId page, std::span<std::byte> content) override {
    check(cudaMemcpyAsync(content.data(), reinterpret_cast<const char*>(page), content.size(),
                          cudaMemcpyDeviceToHost, stream_),
          "fetching a page of the KV cache");
    check(cudaStreamSynchronize(stream_), "fetching a page of the KV cache");
  }
  KvPageId add_page(std::span<const std::byte> content) override {
    char* const page = pool_.take();
    try {
      check(cudaMemcpyAsync(page, content.data(), content.size(), cudaMemcpyHostToDevice, stream_),
            "sending a page of the KV cache");
      check(cudaStreamSynchronize(stream_), "sending a page of the KV cache");
    } catch (...) {
      pool_.give_back(page);
      throw;
    }
    return KvPageId{reinterpret_cast<std::uintptr_t>(page)};
  }
  std::int64_t kv_pages_in_use() const override { return pool_.in_use(); }

  SampledToken sample(SequenceId id, std::span<const float> logits) override {
    return find(id).sampler.sample(logits);
  }

  void release_sequence(SequenceId id) override {
    for (char* page : find(id).pages) pool_.give_back(page);
    sequences_.erase(id);
  }

  std::int64_t length(SequenceId id) const override { return sequences_.find(id).length; }

  void reserve(SequenceId id, std::int64_t positions) override {
    Sequence& sequence = find(id);
    sequences_.check.reserve(id, positions);
    grow(sequence, positions);
  }

  void truncate(SequenceId id, std::int64_t length) override {
    Sequence& sequence = find(id);
    sequences_.check.truncate(id, sequence, length);
    sequence.truncate(length);
  }

  void prefill(SequenceId id, std::span<const TokenId> tokens,
               const PrefillOutput& output) override {
    Sequence& sequence = find(id);
    sequences_.check.prefill(id, sequence, tokens, output);
    grow(sequence, sequence.length + std::ssize(tokens));
    prefill_in_pieces(sequence, tokens, prefill_.max_tokens(), output, config_.hidden_size,
                      [&](std::span<const TokenId> piece, const PrefillOutput& its_output) {
                        const PrefillPart part{id, piece, its_output};
                        prefill_pass({&part, 1});
                      });
  }

  void prefill_together(std::span<const PrefillPart> parts) override {
    sequences_.check.prefill_together(parts);
    std::vector<std::int64_t> lengths;
    for (const PrefillPart& part : parts) {
      Sequence& sequence = find(part.sequence);
      sequences_.check.prefill(part.sequence, sequence, part.tokens, part.output);
      lengths.push_back(sequence.length);
    }
    for (const PrefillPart& part : parts) {
      Sequence& sequence = find(part.sequence);
      grow(sequence, sequence.length + std::ssize(part.tokens));
    }
    try {
      prefill_passes(parts);
    } catch (...) {
      for (std::size_t i = 0; i < parts.size(); ++i) find(parts[i].sequence).truncate(lengths[i]);
      throw;
    }
  }

  void decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
              std::int32_t steps, std::span<SampledToken> sampled,
              std::span<float> logits) override {
    for (Sequence* sequence :
         sequences_.find_batch(sequences, inputs, steps, sampled.size(), logits.size()))
      grow(*sequence, sequence->length + steps);
    if (!decodes_rows())
      return streams() ? decode_one_by_one(sequences, inputs, steps, sampled, logits)
                       : decode_by_layers(sequences, inputs, steps, sampled, logits);
    std::vector<std::size_t> together;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const Sequence& sequence = find(sequences[b]);
      if (needs_host(sequence.sampling))
        decode_row_with_host({sequences, inputs, sampled, logits, std::span(&b, 1), steps});
      else if (sequence.steps_alike(2) == 1)
        decode_row_by_steps({sequences, inputs, sampled, logits, std::span(&b, 1), steps});
      else
        together.push_back(b);
    }
    const std::size_t most = max_rows();
    for (const std::vector<std::size_t>& group : alike_groups(sequences, together)) {
      for (std::size_t first = 0; first < group.size(); first += most) {
        const std::size_t count = std::min(most, group.size() - first);
        decode_rows(
            {sequences, inputs, sampled, logits, std::span(group).subspan(first, count), steps});
      }
    }
  }

  void verify(std::span<Proposal> batch) override {
    if (!decodes_rows()) return verify_by_steps(*this, batch);
    std::vector<SequenceId> ids;
    std::vector<std::int64_t> lengths;
    for (Sequence* sequence : sequences_.find_batch(batch)) lengths.push_back(sequence->length);
    for (std::size_t b = 0; b < batch.size(); ++b) {
      ids.push_back(batch[b].sequence);
      grow(find(ids[b]), lengths[b] + std::ssize(batch[b].tokens));
    }
    try {
      verify_groups(batch, ids);
    } catch (...) {
      for (std::size_t b = 0; b < batch.size(); ++b) find(ids[b]).truncate(lengths[b]);
      throw;
    }
  }

  std::vector<TimelineEvent> record_timeline(SequenceId id, TokenId input) override {
    require(unstreamed_.empty(), ErrorKind::unsupported,
            "a timeline shows the streaming kernel; this model is decoded {}, because it has {}",
            path(), unstreamed_);
    Sequence& sequence =
        *sequences_.find_batch(std::span(&id, 1), std::span(&input, 1), 1, 0, 0).front();
    grow(sequence, sequence.length + 1);
    const auto sms = static_cast<std::size_t>(properties_.multiProcessorCount);
    const bool of_rows = stream_decoder_.has_value();
    constexpr static std::size_t kFirst = 0;
    std::vector<std::uint64_t> times(sms * (config_.num_layers + 1) * timeline_points(of_rows));
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
        run(sequence, input, 1, 0, false, 0.0f);
    } catch (...) {
      record(nullptr);
      throw;
    }
    record(nullptr);
    check(cudaMemcpy(times.data(), memory.as<>(), bytes, cudaMemcpyDeviceToHost),
          "fetching the timeline");
    return timeline_events(times, properties_.multiProcessorCount,
                           static_cast<std::int32_t>(config_.num_layers), of_rows);
  }

  double measure_read_ceiling() override {
    return cuda::measure_read_ceiling(weights_.weights().as<>(), weights_.weights().bytes());
  }

 private:
  // Whether the decode kernel for one row takes this model.
  bool streams() const noexcept { return plan_.stages > 0; }
  // How a model that it does not take is decoded.
  std::string_view path() const noexcept {
    return gemm_decoder_ ? "as a series of kernels" : "layer by layer";
  }

  void prepare() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
    host_logits_.resize(config_.vocab_size);
    prepare_rows();
    if (!streams()) return;
    const DecodeKernel kernel =
        find_decode_kernel(plan_.kind, config_.dtype, fragments_needed(config_, plan_),
                           static_cast<int>(config_.head_dim));
    kernel_ = kernel.function;
    prepare_kernel(kernel_, plan_, properties_);
    const bool packs = has_packed_operands(plan_.kind, kernel.fragments);
    params_ = stream_params(config_, plan_, properties_.multiProcessorCount,
                            packs ? kernel.fragments : 0);
    read_more_at_once(params_, plan_.kind);
    allocate_scratch();
    weights_.tell(params_);
  }

  void prepare_rows() {
    if (streams()) {
      if (mode_ != DecodeMode::throughput ||
          !StreamDecoder::supports(config_, plan_.kv, properties_))
        return;
      stream_decoder_.emplace(config_, plan_.kv, weights_, properties_, max_positions_,
                              kStepsOfLaunch);
    }
    if (plan_.kv.dtype == config_.dtype && GemmDecoder::supports(config_, properties_))
      gemm_decoder_.emplace(config_, plan_.kv, weights_, properties_.multiProcessorCount,
                            max_positions_, kStepsOfLaunch);
  }
  // Whether a step takes several rows.
  bool decodes_rows() const noexcept { return stream_decoder_ || gemm_decoder_; }
  std::size_t max_rows() const noexcept {
    return static_cast<std::size_t>(gemm_decoder_ ? kMaxGemmRows : plan::kMaxRows);
  }
  // The quicker one of those that there are; the bits are the same.
  RowDecoder& decoder_of(std::size_t rows) {
    if (!gemm_decoder_) return *stream_decoder_;
    const bool streams =
        stream_decoder_ && std::cmp_less_equal(rows, stream_decoder_->quick_rows());
    if (streams) return *stream_decoder_;
    return *gemm_decoder_;
  }

  // By default nine tenths of what the weights and scratch memory have left.
  std::int64_t kv_pages(std::int64_t bytes) const {
    const std::int64_t page_bytes = plan_.kv.page_bytes;
    if (bytes == 0) {
      std::size_t free = 0, total = 0;
      check(cudaMemGetInfo(&free, &total), "asking for free memory");
      return static_cast<std::int64_t>(free) / 10 * 9 / page_bytes;
    }
    return kv_pages_in(bytes, page_bytes);
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
    const std::int64_t phases = num_phases(config_.num_layers, config_.parallel_residual);
    counters_ = DeviceMemory((kStepsOfLaunch * phases + 1) * 4, "counters");
    params_.tickets = counters_.as<std::uint32_t>();
    params_.arrivals = params_.tickets + kStepsOfLaunch * phases;
    lamport_ = DeviceMemory(std::int64_t{kLamportSets} * params_.layout.bytes, "Lamport buffers");
    params_.lamport = lamport_.as<>();
    logits_ = DeviceMemory(kStepsOfLaunch * config_.vocab_size * 4, "logits");
    tokens_ = DeviceMemory(kStepsOfLaunch * 4 * 2, "tokens");
    const std::int64_t pages = info_.max_positions / kKvPagePositions + 1;
    page_table_ = DeviceMemory(pages * sizeof(char*), "the page table");
    params_.kv_pages = page_table_.as<char*>();
    params_.given_tokens = tokens_.as<std::int32_t>();
    params_.given_count = 1;
    params_.chosen = tokens_.as<std::int32_t>() + kStepsOfLaunch;
    host_chosen_.resize(kStepsOfLaunch);
  }

  Sequence& find(SequenceId id) { return sequences_.find(id); }

  // The pages up to `positions`, of which those that are to be written are the sequence's alone.
  void grow(Sequence& sequence, std::int64_t positions) {
    const std::int64_t pages = kv_pages_of(positions);
    const std::int64_t had = std::ssize(sequence.pages);
    for (std::int64_t p = sequence.length / kKvPagePositions; p < std::min(had, pages); ++p)
      make_own(sequence.pages[static_cast<std::size_t>(p)]);
    while (std::ssize(sequence.pages) < pages) sequence.pages.push_back(pool_.take());
  }

  // How many of the first parts one pass takes.
  std::size_t parts_of_pass(std::span<const PrefillPart> parts) {
    const auto comes_alone = [&](const PrefillPart& part) {
      return find(part.sequence).interventions != nullptr || !part.output.activations.empty();
    };
    std::size_t count = 0;
    PromptNeed need;
    for (const PrefillPart& part : parts) {
      if (count > 0 && comes_alone(part)) break;
      need.add(piece_of(part, part.output));
      if (!prefill_.fits(need)) break;
      ++count;
      if (comes_alone(part)) break;
    }
    return count;
  }

  PromptPiece piece_of(const PrefillPart& part, const PrefillOutput& output) {
    const Sequence& sequence = find(part.sequence);
    return {part.tokens, sequence.length, sequence.pages, sequence.interventions.get(), &output};
  }

  void prefill_passes(std::span<const PrefillPart> parts) {
    for (std::size_t begin = 0; begin < parts.size();) {
      const std::size_t count = parts_of_pass(parts.subspan(begin));
      prefill_pass(parts.subspan(begin, count));
      begin += count;
    }
  }

  // What samplers choose from comes to the host.
  void prefill_pass(std::span<const PrefillPart> parts) {
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    std::size_t choosing = 0;
    for (const PrefillPart& part : parts)
      choosing += part.output.sampled != nullptr && part.output.last_logits.empty();
    if (host_logits_.size() < choosing * vocab) host_logits_.resize(choosing * vocab);
    std::vector<PrefillOutput> outputs;
    std::vector<PromptPiece> pieces;
    outputs.reserve(parts.size());
    std::span<float> room = host_logits_;
    for (const PrefillPart& part : parts) {
      PrefillOutput& output = outputs.emplace_back(part.output);
      if (output.sampled != nullptr && output.last_logits.empty()) {
        output.last_logits = room.first(vocab);
        room = room.subspan(vocab);
      }
      pieces.push_back(piece_of(part, output));
    }
    prefill_.run(pieces, stream_);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      Sequence& sequence = find(parts[i].sequence);
      sequence.append(parts[i].tokens);
      if (outputs[i].sampled != nullptr)
        *outputs[i].sampled = sequence.sampler.sample(outputs[i].last_logits);
    }
  }

  // `steps` steps of one sequence in one launch (at most steps_alike()): the first one's input is
  // given, those of later ones are what was chosen before. Errors: non_finite, with the sequence as
  // it was.
  void run(Sequence& sequence, TokenId input, std::int64_t steps, std::int64_t first_scored,
           bool want_logits, float temperature) {
    send(sequence, input);
    params_.first_position = static_cast<std::int32_t>(sequence.length);
    params_.steps = static_cast<std::int32_t>(steps);
    params_.first_scored_step = static_cast<std::int32_t>(first_scored);
    params_.logits = want_logits ? logits_.as<float>() : nullptr;
    params_.temperature = temperature;
    params_.seed = sequence.sampling.seed;
    params_.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
    interventions_.at_step(sequence.interventions, sequence.length, stream_).tell(params_);
    launch(params_);
    wait(sequence.length, steps, first_scored);
    sequence.append(std::span(&input, 1));
    // Inputs that the device chose for itself.
    sequence.append(std::span<const TokenId>(host_chosen_).first(steps - 1));
  }

  std::int32_t drawable_vocab_size(const SamplingParams& sampling) const {
    const std::int64_t all = config_.vocab_size;
    const std::int64_t wanted = sampling.drawable_vocab_size;
    return static_cast<std::int32_t>(wanted > 0 ? std::min(wanted, all) : all);
  }

  void send(const Sequence& sequence, const TokenId& input) {
    check(cudaMemcpyAsync(tokens_.as<>(), &input, sizeof(input), cudaMemcpyHostToDevice, stream_),
          "sending a token");
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

  // Room for the logits of one row.
  std::span<float> vocab_logits() {
    return std::span(host_logits_).first(static_cast<std::size_t>(config_.vocab_size));
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

  // Rows whose interventions are the same share launches.
  std::vector<std::vector<std::size_t>> alike_groups(std::span<const SequenceId> sequences,
                                                     std::span<const std::size_t> rows) {
    std::vector<std::vector<std::size_t>> groups;
    for (const std::size_t row : rows) {
      const auto& own = find(sequences[row]).interventions;
      const auto same = std::ranges::find_if(groups, [&](const auto& group) {
        return find(sequences[group.front()]).interventions == own;
      });
      if (same == groups.end())
        groups.push_back({row});
      else
        same->push_back(row);
    }
    return groups;
  }

  // One sequence, a launch for each step that is steered as its position is.
  void decode_row_by_steps(const DecodeCall& call) {
    const std::size_t batch = call.sequences.size();
    std::vector<TokenId> inputs(call.inputs.begin(), call.inputs.end());
    Sequence& sequence = find(call.sequence(0));
    std::int32_t alike = 0;
    for (std::int32_t done = 0; done < call.steps; done += alike) {
      alike = sequence.steps_alike(call.steps - done);
      DecodeCall part = call;
      part.inputs = inputs;
      part.steps = alike;
      if (!call.sampled.empty()) part.sampled = call.sampled.subspan(done * batch, alike * batch);
      decode_rows(part);
      if (!call.sampled.empty()) inputs[call.rows[0]] = part.room(alike - 1, 0)->token;
    }
  }

  // All in the same launches; interventions and steps are alike. Errors: non_finite, with the
  // sequences as they were.
  void decode_rows(const DecodeCall& call) {
    std::vector<DecodeRow> rows;
    std::vector<std::size_t> filtered;  // rows whose tokens the sampler chooses
    for (std::size_t row = 0; row < call.count(); ++row) {
      const Sequence& sequence = find(call.sequence(row));
      const bool filters = needs_sampler(sequence.sampling);
      if (filters) filtered.push_back(row);
      rows.push_back(row_of(sequence, call.input(row), !filters));
    }
    RowDecoder& decoder = decoder_of(rows.size());
    tell_interventions(decoder, find(call.sequence(0)));
    if (filtered.empty())
      decoder.enqueue(rows, call.steps, !call.logits.empty(), stream_);
    else
      enqueue_with_samplers(decoder, call, rows, filtered);
    take_chosen(decoder, call, filtered);
    fetch_row_logits(decoder, call);
  }
  void tell_interventions(RowDecoder& decoder, const Sequence& sequence) {
    decoder.intervene(interventions_.at_step(sequence.interventions, sequence.length, stream_));
  }
  void fetch_row_logits(const RowDecoder& decoder, const DecodeCall& call) {
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    for (std::size_t row = 0; row < call.count() && !call.logits.empty(); ++row)
      check(cudaMemcpy(call.logits.data() + call.rows[row] * vocab, decoder.logits(row),
                       vocab * sizeof(float), cudaMemcpyDeviceToHost),
            "fetching logits");
  }

  // One sequence, step by step: the host chooses its tokens, for what the device does not know.
  void decode_row_with_host(const DecodeCall& call) {
    Sequence& sequence = find(call.sequence(0));
    RowDecoder& decoder = decoder_of(1);
    TokenId input = call.input(0);
    for (std::int32_t step = 0; step < call.steps; ++step) {
      const DecodeRow row = row_of(sequence, input, false);
      tell_interventions(decoder, sequence);
      decoder.enqueue(std::span(&row, 1), 1, true, stream_);
      std::int32_t chosen = 0;
      check(cudaMemcpyAsync(&chosen, decoder.chosen(), sizeof(chosen), cudaMemcpyDeviceToHost,
                            stream_),
            "fetching tokens");
      check(cudaStreamSynchronize(stream_), "running the streaming kernel");
      require_finite(chosen, sequence.length);
      sequence.append(std::span(&input, 1));
      SampledToken* room = call.room(step, 0);
      if (room == nullptr) continue;
      check(cudaMemcpy(host_logits_.data(), decoder.logits(0), vocab_logits().size_bytes(),
                       cudaMemcpyDeviceToHost),
            "fetching logits");
      *room = sequence.sampler.sample(vocab_logits());
      input = room->token;
    }
    fetch_row_logits(decoder, call);
  }

  static void require_finite(std::int32_t chosen, std::int64_t position) {
    require(chosen >= 0, ErrorKind::non_finite,
            "the logits after position {} are not finite: the checkpoint holds NaN or infinity, "
            "or an activation overflowed",
            position);
  }

  // A launch for each step, and behind it the samplers of the rows that have one, which leave the
  // next step's inputs.
  void enqueue_with_samplers(RowDecoder& decoder, const DecodeCall& call,
                             std::vector<DecodeRow> rows, std::span<const std::size_t> filtered) {
    while (row_samplers_.size() < filtered.size())
      row_samplers_.emplace_back(config_.vocab_size, kStepsOfLaunch);
    for (std::size_t i = 0; i < filtered.size(); ++i) {
      const Sequence& sequence = find(call.sequence(filtered[i]));
      const std::span<const TokenId> before = sequence.sampler.tokens();
      std::vector<TokenId> tokens(before.begin(), before.end());
      tokens.push_back(call.input(filtered[i]));
      row_samplers_[i].begin(sequence.sampling, tokens, sequence.length + 1, stream_);
    }
    std::vector<const TokenId*> inputs(call.count(), nullptr);
    for (std::int32_t step = 0; step < call.steps; ++step) {
      decoder.enqueue_step(rows, step, inputs, stream_);
      for (std::size_t row = 0; row < call.count(); ++row) {
        inputs[row] = decoder.chosen(step) + row;
        ++rows[row].position;
      }
      for (std::size_t i = 0; i < filtered.size(); ++i)
        inputs[filtered[i]] = row_samplers_[i].choose(decoder.logits(filtered[i]), stream_);
    }
    for (std::size_t i = 0; i < filtered.size(); ++i) row_samplers_[i].fetch(stream_);
  }

  // Waits for what was enqueued and appends it to the sequences. Errors: non_finite.
  void take_chosen(const RowDecoder& decoder, const DecodeCall& call,
                   std::span<const std::size_t> filtered) {
    const bool in_series = !filtered.empty();
    const std::size_t stride = in_series ? decoder.max_rows() : call.count();
    std::vector<std::int32_t> chosen(call.steps * stride);
    check(cudaMemcpyAsync(chosen.data(), decoder.chosen(), chosen.size() * sizeof(std::int32_t),
                          cudaMemcpyDeviceToHost, stream_),
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
        sequence.append(std::span(&input, 1));
        SampledToken token{chosen[step * stride + row], 0.0f, {}};
        if (filters) token = row_samplers_[sampler].chosen(step);
        input = token.token;
        if (SampledToken* room = call.room(step, row)) *room = std::move(token);
      }
      sampler += filters;
    }
  }

  void verify_groups(std::span<Proposal> batch, std::span<const SequenceId> ids) {
    std::vector<std::size_t> together;
    for (std::size_t b = 0; b < batch.size(); ++b) {
      // Rows that are steered each as its position is have no step in common.
      if (find(ids[b]).steps_alike(2) == 1)
        verify_by_steps(*this, batch.subspan(b, 1));
      else
        together.push_back(b);
    }
    for (const std::vector<std::size_t>& group : alike_groups(ids, together)) {
      std::vector<Proposal*> proposals;
      std::size_t rows = 0;
      for (const std::size_t b : group) {
        const std::size_t more = batch[b].tokens.size();
        if (rows + more > max_rows()) {
          verify_rows(proposals);
          proposals.clear();
          rows = 0;
        }
        proposals.push_back(&batch[b]);
        rows += more;
      }
      verify_rows(proposals);
    }
  }

  // How a sequence's rows of a verify_rows() are chosen from.
  struct VerifiedRows {
    std::size_t first_row = 0;
    std::optional<std::size_t> first_sampler;  // of row_samplers_, one for each row
    bool on_host = false;
  };

  // All tokens of the proposals are rows of one step; interventions are alike.
  void verify_rows(std::span<Proposal* const> proposals) {
    std::vector<DecodeRow> rows;
    std::vector<VerifiedRows> verified;
    std::size_t samplers = 0;
    bool with_logits = false;
    for (const Proposal* proposal : proposals) {
      const Sequence& sequence = find(proposal->sequence);
      VerifiedRows own{rows.size(), std::nullopt, needs_host(sequence.sampling)};
      if (!own.on_host && needs_sampler(sequence.sampling)) own.first_sampler = samplers;
      if (own.first_sampler) samplers += proposal->tokens.size();
      const bool by_logits = own.on_host || own.first_sampler;
      with_logits |= by_logits;
      for (const TokenId token : proposal->tokens) {
        rows.push_back(row_of(sequence, token, !by_logits));
        rows.back().position += std::ssize(rows) - 1 - static_cast<std::int64_t>(own.first_row);
      }
      verified.push_back(own);
    }
    RowDecoder& decoder = decoder_of(rows.size());
    tell_interventions(decoder, find(proposals.front()->sequence));
    decoder.enqueue(rows, 1, with_logits, stream_);
    for (std::size_t i = 0; i < proposals.size(); ++i) {
      if (verified[i].first_sampler) enqueue_samplers(decoder, *proposals[i], verified[i]);
    }
    std::vector<std::int32_t> chosen(rows.size());
    check(cudaMemcpyAsync(chosen.data(), decoder.chosen(), chosen.size() * sizeof(std::int32_t),
                          cudaMemcpyDeviceToHost, stream_),
          "fetching tokens");
    check(cudaStreamSynchronize(stream_), "running the streaming kernel");
    for (std::size_t i = 0; i < proposals.size(); ++i)
      choose_verified(decoder, *proposals[i], verified[i], chosen);
  }

  // Each row's sampler has seen the tokens up to its own.
  void enqueue_samplers(RowDecoder& decoder, const Proposal& proposal, const VerifiedRows& rows) {
    const Sequence& sequence = find(proposal.sequence);
    while (row_samplers_.size() < *rows.first_sampler + proposal.tokens.size())
      row_samplers_.emplace_back(config_.vocab_size, kStepsOfLaunch);
    const std::span<const TokenId> before = sequence.sampler.tokens();
    std::vector<TokenId> tokens(before.begin(), before.end());
    for (std::size_t i = 0; i < proposal.tokens.size(); ++i) {
      tokens.push_back(proposal.tokens[i]);
      DeviceSampler& sampler = row_samplers_[*rows.first_sampler + i];
      sampler.begin(sequence.sampling, tokens, sequence.length + 1 + static_cast<std::int64_t>(i),
                    stream_);
      sampler.choose(decoder.logits(rows.first_row + i), stream_);
      sampler.fetch(stream_);
    }
  }

  // What was computed is there.
  void choose_verified(const RowDecoder& decoder, Proposal& proposal, const VerifiedRows& rows,
                       std::span<const std::int32_t> chosen) {
    Sequence& sequence = find(proposal.sequence);
    choose_run(sequence, proposal, [&](std::size_t i) {
      const std::size_t row = rows.first_row + i;
      require_finite(chosen[row], sequence.length - 1);
      if (rows.first_sampler) return row_samplers_[*rows.first_sampler + i].chosen(0);
      if (!rows.on_host) return SampledToken{chosen[row], 0.0f, {}};
      check(cudaMemcpy(host_logits_.data(), decoder.logits(row), vocab_logits().size_bytes(),
                       cudaMemcpyDeviceToHost),
            "fetching logits");
      return sequence.sampler.sample(vocab_logits());
    });
  }

  // Pieces of one token, of as many sequences as a pass takes; the host chooses. What is thrown
  // leaves the sequences as they were.
  void decode_by_layers(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                        std::int32_t steps, std::span<SampledToken> sampled,
                        std::span<float> logits) {
    const std::size_t batch = sequences.size();
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    if (host_logits_.size() < batch * vocab) host_logits_.resize(batch * vocab);
    const auto logits_of = [&](std::size_t b) {
      return std::span(host_logits_).subspan(b * vocab, vocab);
    };
    std::vector<TokenId> current(inputs.begin(), inputs.end());
    std::vector<PrefillPart> parts;
    std::vector<std::int64_t> lengths;
    for (std::size_t b = 0; b < batch; ++b) {
      PrefillOutput output;
      output.last_logits = logits_of(b);
      parts.push_back({sequences[b], std::span(&current[b], 1), output});
      lengths.push_back(find(sequences[b]).length);
    }
    try {
      for (std::int32_t step = 0; step < steps; ++step) {
        prefill_passes(parts);
        for (std::size_t b = 0; !sampled.empty() && b < batch; ++b) {
          SampledToken& token = sampled[step * batch + b];
          token = find(sequences[b]).sampler.sample(logits_of(b));
          current[b] = token.token;
        }
      }
      if (!logits.empty()) std::copy_n(host_logits_.begin(), batch * vocab, logits.begin());
    } catch (...) {
      for (std::size_t b = 0; b < batch; ++b) find(sequences[b]).truncate(lengths[b]);
      throw;
    }
  }

  // Where the streaming kernel has only one row.
  void decode_one_by_one(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                         std::int32_t steps, std::span<SampledToken> sampled,
                         std::span<float> logits) {
    const std::size_t batch = sequences.size();
    const std::int64_t vocab = config_.vocab_size;
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
    std::int32_t alike = 0;
    for (std::int32_t done = 0; done < steps; done += alike) {
      alike = sequence.steps_alike(steps - done);
      run(sequence, input, alike, 0, !logits.empty(), sequence.sampling.temperature);
      for (std::int32_t step = 0; !sampled.empty() && step < alike; ++step)
        sampled[(done + step) * batch + b] = SampledToken{host_chosen_[step], 0.0f, {}};
      input = host_chosen_[alike - 1];
    }
    if (!logits.empty()) copy_logits(alike - 1, logits);
  }

  // A launch for each step, whose logits come to the host, where the token is chosen: for what the
  // device does not know.
  void decode_with_host(Sequence& sequence, TokenId input, std::int32_t steps,
                        std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                        std::span<float> logits) {
    for (std::int32_t step = 0; step < steps; ++step) {
      run(sequence, input, 1, 0, true, 0.0f);
      copy_logits(0, vocab_logits());
      if (sampled.empty()) continue;
      SampledToken token = sequence.sampler.sample(vocab_logits());
      input = token.token;
      sampled[step * batch + b] = std::move(token);
    }
    if (!logits.empty()) std::ranges::copy(vocab_logits(), logits.begin());
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
    send(sequence, input);
    DecodeParams params = params_;
    params.steps = 1;
    params.first_scored_step = 0;
    params.logits = logits_.as<float>();
    params.temperature = 0.0f;
    params.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
    for (std::int32_t step = 0; step < steps; ++step) {
      params.first_position = static_cast<std::int32_t>(sequence.length) + step;
      interventions_.at_step(sequence.interventions, params.first_position, stream_).tell(params);
      params.chosen = params_.chosen + step;  // -1 if the logits are not finite
      launch(params);
      params.given_tokens = sampler_.choose(logits_.as<float>(), stream_);
    }
    sampler_.fetch(stream_);
    wait(sequence.length, steps, 0);
    for (std::int32_t step = 0; step < steps; ++step) {
      SampledToken token = sampler_.chosen(step);
      sequence.append(std::span(&input, 1));
      input = token.token;
      if (!sampled.empty()) sampled[step * batch + b] = std::move(token);
    }
    if (!logits.empty()) copy_logits(0, logits);
  }

  std::shared_ptr<const Model> model_;
  const ModelConfig config_;
  cudaDeviceProp properties_;
  std::string unstreamed_;  // why the decode kernel does not take the model, if so
  plan::DecodePlan plan_;
  std::int64_t max_positions_;
  DecodeMode mode_;
  DeviceModel weights_;
  KvPool pool_;
  Prefill prefill_;
  InterventionTable interventions_;
  DeviceSampler sampler_;
  std::deque<DeviceSampler> row_samplers_;
  std::optional<StreamDecoder> stream_decoder_;
  std::optional<GemmDecoder> gemm_decoder_;
  BackendInfo info_;
  DeviceMemory counters_, lamport_, logits_, tokens_, page_table_;
  std::vector<float> host_logits_;
  std::vector<std::int32_t> host_chosen_;
  DecodeParams params_{};
  const void* kernel_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Sequences<Sequence> sequences_;
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
  if (cudaGetDevice(&device) != cudaSuccess) return "the NVIDIA GPU does not answer";
  try {
    return cuda::no_code_because(device);
  } catch (const Error&) {
    return "the NVIDIA GPU does not answer";
  }
}

std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model,
                                           const BackendOptions& options) {
  const std::string reason = cuda_unavailable_reason();
  require(reason.empty(), ErrorKind::unsupported, "device \"cuda\": {}; use device \"cpu\"",
          reason);
  return std::make_unique<cuda::CudaBackend>(std::move(model), options);
}

}  // namespace clusterfusion
