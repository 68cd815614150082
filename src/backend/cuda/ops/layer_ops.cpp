// The layer calls on a GPU: from checked work to launches.
#include "backend/layer_ops.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <bit>
#include <compare>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/driver_function.hpp"
#include "backend/cuda/ops/layer_kernel.hpp"
#include "backend/cuda/ops/layer_scratch.hpp"
#include "backend/cuda/ops/plain_layer.hpp"
#include "backend/cuda/relaxed_capture.hpp"
#include "backend/cuda/tensor_map.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

// Makes a device current for a launch. What the calls keep of a device (plans, scratch) does not
// outlive cudaDeviceReset().
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    static const int devices = [] {
      int count = 0;
      return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
    }();
    require(
        device < devices, ErrorKind::unsupported,
        "the tensors are on cuda:{}, and the CUDA runtime finds {} GPUs; move the tensors to the "
        "CPU",
        device, devices);
    // Nothing to do in most calls: the context of this device is the thread's since the last one.
    // Without a context, as in a new thread, the driver's own functions fail.
    static const auto get_context = driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
    thread_local int last_device = -1;
    thread_local CUcontext last_context = nullptr;
    CUcontext context = nullptr;
    get_context(&context);
    if (context != nullptr && context == last_context && device == last_device) return;
    check(cudaGetDevice(&before_), "asking for the current device");
    changed_ = device != before_;
    check(cudaSetDevice(device), "choosing the device");
    get_context(&last_context);
    last_device = device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct ShapeKey {
  int device = 0;
  DType dtype = DType::float16;
  // All 0 for what does not stream, whatever its sizes.
  std::int64_t hidden = 0, intermediate = 0, heads = 0, rotary = 0;

  auto operator<=>(const ShapeKey&) const = default;
};

// What depends on device and shape alone.
struct LayerPlan {
  int sm_count = 0;
  // The streaming kernels for caches in rows and in pages, in the device's primary context. Null
  // for a shape that they do not take, which the plain kernels compute: then nothing below counts.
  CUfunction kernel = nullptr;
  CUfunction paged_kernel = nullptr;
  bool by_maps = false;  // they copy caches by tensor maps
  plan::DecodePlan plan;
  DecodeParams stream;

  bool streams() const noexcept { return kernel != nullptr; }
};

// The matrices', of 16-bit elements.
std::int64_t layer_weight_bytes(const ModelConfig& config) {
  const std::int64_t columns =
      config.qkv_size() + config.attention_size() + 2 * config.intermediate_size;
  return columns * config.hidden_size * 2;
}

// The streaming kernels for `config`, if there are any. They have code for plain layers alone: of a
// hidden size that is no multiple of the heads' there is none.
void find_stream(const ModelConfig& config, const cudaDeviceProp& properties, LayerPlan& result) {
  const plan::DeviceLimits limits = limits_of(properties);
  if (plan::layer_kind(config) != plan::LayerKind::plain || !plan::can_stream(config, limits))
    return;
  result.plan = plan::make_decode_plan(config, limits);
  const int fragments = fragments_needed(config, result.plan);
  const auto head_dim = static_cast<int>(config.head_dim);
  if (find_layer_kernel(config.dtype, fragments, head_dim, false) == nullptr) return;
  result.stream = stream_params(config, result.plan, result.sm_count, /*packed_fragments=*/0);
  result.stream.reads_once = exceed_l2(layer_weight_bytes(config), properties);
  for (const bool in_pages : {false, true}) {
    const void* kernel = find_layer_kernel(config.dtype, fragments, head_dim, in_pages);
    prepare_kernel(kernel, result.plan, properties);
    check(cudaGetFuncBySymbol(in_pages ? &result.paged_kernel : &result.kernel, kernel),
          "looking for the layer kernel");
  }
  result.by_maps = has_bulk_copies(properties);
}

// A model of one such layer.
ModelConfig config_of(const ShapeKey& key) {
  ModelConfig config;
  config.dtype = key.dtype;
  config.num_layers = 1;
  config.hidden_size = key.hidden;
  config.intermediate_size = key.intermediate;
  config.num_heads = key.heads;
  config.head_dim = key.hidden / key.heads;
  config.rotary_dim = key.rotary;
  config.vocab_size = key.hidden;  // there is no LM head; any size that can be cut
  config.parallel_residual = true;
  return config;
}

std::unique_ptr<LayerPlan> make_plan(const ShapeKey& key) {
  const RelaxedCapture relaxed;  // the first look at a kernel loads it
  const std::string reason = no_code_because(key.device);
  require(reason.empty(), ErrorKind::unsupported,
          "the tensors are on cuda:{}, and {}, or move the tensors to the CPU", key.device, reason);
  const cudaDeviceProp properties = device_properties(key.device);
  auto result = std::make_unique<LayerPlan>();
  result->sm_count = properties.multiProcessorCount;
  if (key.hidden != 0) find_stream(config_of(key), properties, *result);
  if (!result->streams()) load_plain_kernels(key.dtype);
  return result;
}

const LayerPlan& find_or_make_plan(const ShapeKey& key) {
  // Never destroyed: calls may still come while static objects go.
  static auto& mutex = *new std::mutex;
  static auto& plans = *new std::map<ShapeKey, std::unique_ptr<LayerPlan>>;
  const std::lock_guard lock(mutex);
  auto& plan = plans[key];
  if (!plan) plan = make_plan(key);
  return *plan;
}

const LayerPlan& plan_for(const ShapeKey& key) {
  // A thread asks for the same again and again.
  thread_local ShapeKey last_key;
  thread_local const LayerPlan* last_plan = nullptr;
  if (last_plan == nullptr || key != last_key) {
    last_plan = &find_or_make_plan(key);
    last_key = key;
  }
  return *last_plan;
}

// A cache in rows or in pages, of which one head's share of `box_rows` positions is copied at once:
// all that its tensor map says.
struct CacheKey {
  void* cache = nullptr;
  DType dtype = DType::float16;
  CacheLayout layout;
  std::int64_t heads = 0, head_dim = 0;
  int box_rows = 0;
  bool in_pages = false;

  bool operator==(const CacheKey&) const = default;
};

CUtensorMap make_cache_map(const CacheKey& key) {
  const auto size = [](std::int64_t count) { return static_cast<std::uint64_t>(count); };
  const auto box_rows = static_cast<std::uint32_t>(key.box_rows);
  const auto head_dim = static_cast<std::uint32_t>(key.head_dim);
  const CacheLayout& layout = key.layout;
  if (!key.in_pages) {
    const std::array sizes{size(key.heads * key.head_dim), size(layout.page_size)};
    const std::array strides{size(layout.position_stride * 2)};
    const std::array box{head_dim, box_rows};
    return make_box_map({key.dtype, key.cache, sizes, strides, box});
  }
  const std::array sizes{size(key.head_dim), size(key.heads), size(layout.page_size),
                         size(layout.pages)};
  const std::array strides{size(layout.head_stride * 2), size(layout.position_stride * 2),
                           size(layout.page_stride * 2)};
  const std::array<std::uint32_t, 4> box{head_dim, 1, box_rows, 1};
  return make_box_map({key.dtype, key.cache, sizes, strides, box});
}

// Making a map costs more than finding it again, so each thread keeps those of its last caches.
// A map holds nothing but what its key says.
const CUtensorMap& cache_map(const CacheKey& key) {
  constexpr int kSlotsLog2 = 8;  // a model of 36 layers has 72 caches
  struct Slot {
    CacheKey key;
    CUtensorMap map;
  };
  // Without a destructor: calls may still come while a thread ends.
  thread_local Slot slots[1 << kSlotsLog2];
  // Multiplied by 2^64 over the golden ratio, caches that lie evenly spaced come to lie apart.
  const std::uint64_t scattered = reinterpret_cast<std::uintptr_t>(key.cache) * 0x9e3779b97f4a7c15u;
  Slot& slot = slots[scattered >> (64 - kSlotsLog2)];
  if (slot.key != key) slot = {key, make_cache_map(key)};
  return slot.map;
}

void set_pages(LayerParams& params, const LayerWork& work) {
  const CacheLayout& cache = work.cache;
  const auto page_size = static_cast<std::int32_t>(cache.page_size);
  params.pages = {.table = work.block_table,
                  .count = static_cast<std::int32_t>(cache.pages),
                  .size_log2 = std::countr_zero(static_cast<unsigned>(page_size)),
                  .box_positions = std::min(page_size, params.stream.kv_block_positions),
                  .page_stride = cache.page_stride,
                  .position_stride = cache.position_stride,
                  .head_stride = cache.head_stride};
}

void set_inputs(LayerParams& params, const LayerWork& work) {
  const LayerSpec& spec = work.spec;
  params.stream.activation = spec.activation;
  params.stream.layer_norm_eps = static_cast<float>(spec.layer_norm_eps);
  params.attention_and_up = true;
  params.k_new = work.k_new;
  params.v_new = work.v_new;
  params.k_cache = work.k_cache;
  params.v_cache = work.v_cache;
  params.cosines = work.cos;
  params.sines = work.sin;
  params.position = static_cast<std::int32_t>(work.position);
  params.device_position = work.positions;
  params.attn_output = work.attn_output;
  params.mlp_intermediate = work.mlp_intermediate;
  params.max_positions = static_cast<std::int32_t>(work.max_pages * work.cache.page_size);
  if (work.block_table != nullptr) set_pages(params, work);
}

// The caches' maps, for kernels that copy by them. Behind set_inputs().
void set_maps(LayerParams& params, const LayerWork& work) {
  const LayerSpec& spec = work.spec;
  const bool in_pages = work.block_table != nullptr;
  CacheKey cache{
      work.k_cache,  work.dtype,
      work.cache,    spec.num_heads,
      spec.head_dim, in_pages ? params.pages.box_positions : params.stream.kv_block_positions,
      in_pages};
  params.key_map = cache_map(cache);
  cache.cache = work.v_cache;
  params.value_map = cache_map(cache);
}

LayerParams params_for(const LayerPlan& plan, const LayerScratchView& scratch,
                       const LayerWork& work) {
  LayerParams params{};
  params.stream = plan.stream;
  params.stream.first_layer = streamed_layer(
      [&](LayerTensor tensor) { return static_cast<const char*>(work.weight(tensor)); });
  params.input = work.input;
  params.stream.bias_element_bytes = 2;
  params.stream.lamport = scratch.lamport;
  params.stream.tickets = scratch.tickets;
  params.started = scratch.started;
  return params;
}

// Whether tensor maps tell where the keys and values of a cache in pages lie: at multiples of 16
// bytes, and strides of less than 2^40 bytes.
bool has_mapped_pages(const LayerWork& work) {
  constexpr std::int64_t kMostElements = std::int64_t{1} << 39, kMostPages = std::int64_t{1} << 30;
  const CacheLayout& cache = work.cache;
  if (cache.pages > kMostPages || work.max_pages > kMostPages / cache.page_size) return false;
  for (const std::int64_t stride : {cache.page_stride, cache.position_stride, cache.head_stride})
    if (stride % 8 != 0 || stride <= 0 || stride >= kMostElements) return false;
  return true;
}

// Whether the streaming kernels compute such a layer, if its sizes let them.
bool may_stream(const LayerWork& work) {
  const LayerSpec& spec = work.spec;
  if (work.rows != 1) return false;
  if (work.part == plan::Part::mlp_down) return true;
  return spec.norm == NormKind::layer_norm && !spec.gated_mlp && spec.parallel_residual &&
         !spec.qk_norm && spec.qkv_layout == QkvLayout::by_kv_head &&
         spec.kv_heads() == spec.num_heads && spec.attention_size() == spec.hidden_size &&
         (work.block_table == nullptr || has_mapped_pages(work));
}

const LayerPlan& plan_for(const LayerWork& work, int device) {
  const LayerSpec& spec = work.spec;
  if (!may_stream(work)) return plan_for(ShapeKey{device, work.dtype});
  ShapeKey key{device,         work.dtype,     spec.hidden_size, spec.intermediate_size,
               spec.num_heads, spec.rotary_dim};
  if (work.part == plan::Part::mlp_down) {
    // Heads do not matter here: any head size that the streaming kernel has.
    constexpr std::int64_t kHeadDim = 16;
    key.heads = std::max<std::int64_t>(spec.hidden_size / kHeadDim, 1);
  }
  return plan_for(key);
}

void launch(const LayerPlan& plan, const LayerParams& params, cudaStream_t stream) {
  launch_layer(params.pages.table != nullptr ? plan.paged_kernel : plan.kernel, params,
               plan.sm_count, plan.plan.shared_bytes, stream);
}

void run_plainly(const LayerPlan& plan, const LayerWork& work, const LayerStream& where) {
  const std::int64_t positions = work.max_pages * work.cache.page_size;
  require(positions <= kMaxPlainPositions, ErrorKind::unsupported,
          "the caches have {} positions for a row, and this layer takes at most {} on a GPU; move "
          "the tensors to the CPU",
          positions, kMaxPlainPositions);
  run_plain_layer(work, {where.device_id, plan.sm_count, static_cast<cudaStream_t>(where.stream)});
}

// The second half alone, of the plan that the first half has or would have.
void run_down(const LayerPlan& plan, const LayerScratchView& scratch, const LayerWork& work,
              cudaStream_t stream) {
  LayerParams params = params_for(plan, scratch, work);
  // Blocks tell each other nothing here, so more copies may be under way, and fewer tickets do.
  constexpr std::int32_t kInFlight = 3;
  params.stream.max_in_flight = std::min(kInFlight, params.stream.stages);
  params.stream.static_percent = 60;
  params.down = true;
  params.attn_input = work.attn_output;
  params.mlp_input = work.mlp_intermediate;
  params.output = work.output;
  launch(plan, params, stream);
}

// The first half, or the whole layer in one launch.
void run_attention(const LayerPlan& plan, const LayerScratchView& scratch, const LayerWork& work,
                   cudaStream_t stream) {
  LayerParams params = params_for(plan, scratch, work);
  set_inputs(params, work);
  if (plan.by_maps) set_maps(params, work);
  params.down = work.part == plan::Part::whole;
  params.output = work.output;
  launch(plan, params, stream);
}

// The whole layer in two launches, which hand over by way of the scratch.
void run_halves(const LayerPlan& plan, const LayerScratchView& scratch, LayerWork work,
                cudaStream_t stream) {
  // What the first launch leaves for the second must not be overwritten by another thread's.
  static auto& both = *new std::mutex;
  const std::lock_guard lock(both);
  void* const output = std::exchange(work.output, nullptr);
  work.attn_output = scratch.between;
  work.mlp_intermediate = static_cast<char*>(scratch.between) + work.spec.hidden_size * 2;
  work.part = plan::Part::attention_and_mlp_up;
  run_attention(plan, scratch, work, stream);
  work.output = output;
  run_down(plan, scratch, work, stream);
}

}  // namespace

void run_layer(const LayerWork& work, const LayerStream& where) {
  const CurrentDevice device(where.device_id);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const LayerPlan& plan = plan_for(work, where.device_id);
  if (!plan.streams()) return run_plainly(plan, work, where);
  const std::int64_t between = (work.spec.hidden_size + work.spec.intermediate_size) * 2;
  const LayerScratchView scratch =
      layer_scratch(where.device_id, stream, plan.stream.layout.bytes, between);
  if (work.part == plan::Part::mlp_down) return run_down(plan, scratch, work, stream);
  if (work.split) return run_halves(plan, scratch, work, stream);
  run_attention(plan, scratch, work, stream);
}

}  // namespace clusterfusion::cuda
