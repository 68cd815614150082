#include "backend/cuda/cuda_backend.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend_impl.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/decode/timeline.hpp"
#include "backend/cuda/device_properties.hpp"
#include "base/fail.hpp"
#include "plan/qkv_rows.hpp"
#include "sampling/adjustments.hpp"

namespace clusterfusion {
namespace cuda {
namespace {

// A pass of so many tokens takes half as long again as one of a single token.
constexpr std::int64_t kLeastPiece = 256;

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

}  // namespace

CudaBackend::CudaBackend(std::shared_ptr<const Model> model, const BackendOptions& options)
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

SequenceId CudaBackend::create_sequence(const SamplingParams& sampling) {
  return sequences_.create(sampling);
}

SequenceId CudaBackend::create_sequence(const SamplingParams& sampling,
                                        std::span<const TokenId> tokens,
                                        std::span<const KvPageId> pages,
                                        std::shared_ptr<const Interventions> interventions) {
  sequences_.check.pages(tokens, pages);
  std::shared_ptr<DeviceInterventions> on_device = interventions_.on_device(interventions, stream_);
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

void CudaBackend::intervene(SequenceId id, std::shared_ptr<const Interventions> interventions) {
  Sequence& sequence = find(id);
  sequences_.check.intervene(id, sequence);
  sequence.interventions = interventions_.on_device(interventions, stream_);
}

KvPageId CudaBackend::hold_page(SequenceId id, std::int64_t index) {
  char* const page = find(id).pages.at(static_cast<std::size_t>(index));
  pool_.share(page);
  return KvPageId{reinterpret_cast<std::uintptr_t>(page)};
}

void CudaBackend::read_page(KvPageId page, std::span<std::byte> content) {
  check(cudaMemcpyAsync(content.data(), reinterpret_cast<const char*>(page), content.size(),
                        cudaMemcpyDeviceToHost, stream_),
        "fetching a page of the KV cache");
  check(cudaStreamSynchronize(stream_), "fetching a page of the KV cache");
}

KvPageId CudaBackend::add_page(std::span<const std::byte> content) {
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

void CudaBackend::release_sequence(SequenceId id) {
  for (char* page : find(id).pages) pool_.give_back(page);
  sequences_.erase(id);
}

void CudaBackend::reserve(SequenceId id, std::int64_t positions) {
  Sequence& sequence = find(id);
  sequences_.check.reserve(id, positions);
  grow(sequence, positions);
}

void CudaBackend::truncate(SequenceId id, std::int64_t length) {
  Sequence& sequence = find(id);
  sequences_.check.truncate(id, sequence, length);
  sequence.truncate(length);
}

void CudaBackend::decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                         std::int32_t steps, std::span<SampledToken> sampled,
                         std::span<float> logits) {
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

std::vector<TimelineEvent> CudaBackend::record_timeline(SequenceId id, TokenId input) {
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

void CudaBackend::prepare() {
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
  params_ =
      stream_params(config_, plan_, properties_.multiProcessorCount, packs ? kernel.fragments : 0);
  read_more_at_once(params_, plan_.kind);
  allocate_scratch();
  weights_.tell(params_);
}

std::int64_t CudaBackend::kv_pages(std::int64_t bytes) const {
  const std::int64_t page_bytes = plan_.kv.page_bytes;
  if (bytes == 0) {
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for free memory");
    return static_cast<std::int64_t>(free) / 10 * 9 / page_bytes;
  }
  return kv_pages_in(bytes, page_bytes);
}

void CudaBackend::make_own(char*& page) {
  if (!pool_.is_shared(page)) return;
  char* const own = pool_.take();
  check(cudaMemcpyAsync(own, page, plan_.kv.page_bytes, cudaMemcpyDeviceToDevice, stream_),
        "copying a page of the KV cache");
  pool_.give_back(page);
  page = own;
}

void CudaBackend::grow(Sequence& sequence, std::int64_t positions) {
  const std::int64_t pages = kv_pages_of(positions);
  const std::int64_t had = std::ssize(sequence.pages);
  for (std::int64_t p = sequence.length / kKvPagePositions; p < std::min(had, pages); ++p)
    make_own(sequence.pages[static_cast<std::size_t>(p)]);
  while (std::ssize(sequence.pages) < pages) sequence.pages.push_back(pool_.take());
}

std::int32_t CudaBackend::drawable_vocab_size(const SamplingParams& sampling) const {
  const std::int64_t all = config_.vocab_size;
  const std::int64_t wanted = sampling.drawable_vocab_size;
  return static_cast<std::int32_t>(wanted > 0 ? std::min(wanted, all) : all);
}

void CudaBackend::require_finite(std::int32_t chosen, std::int64_t position) {
  require(chosen >= 0, ErrorKind::non_finite,
          "the logits after position {} are not finite: the checkpoint holds NaN or infinity, "
          "or an activation overflowed",
          position);
}

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
