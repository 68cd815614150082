// The fused layer calls on a GPU: from checked tensors to a launch.
#include "backend/layer_ops.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
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
  std::int64_t hidden = 0, intermediate = 0, heads = 0, rotary = 0;

  auto operator<=>(const ShapeKey&) const = default;
};

// What depends on device and shape alone.
struct LayerPlan {
  int sm_count = 0;
  // The streaming kernel, in the device's primary context. Null for a shape that it does not take,
  // which the plain kernels compute: then nothing below counts.
  CUfunction kernel = nullptr;
  bool by_maps = false;  // it copies caches by tensor maps
  plan::DecodePlan plan;
  DecodeParams stream;

  bool streams() const noexcept { return kernel != nullptr; }
};

// The streaming kernel for `config`, if there is one.
void find_stream(const ModelConfig& config, const cudaDeviceProp& properties, LayerPlan& result) {
  const plan::DeviceLimits limits = limits_of(properties);
  if (!plan::can_stream(config, limits)) return;
  result.plan = plan::make_decode_plan(config, limits);
  const void* kernel = find_layer_kernel(config.dtype, fragments_needed(config, result.plan),
                                         static_cast<int>(config.head_dim));
  if (kernel == nullptr) return;
  result.stream = stream_params(config, result.plan, result.sm_count, /*packed_operands=*/false);
  prepare_kernel(kernel, result.plan, properties);
  check(cudaGetFuncBySymbol(&result.kernel, kernel), "looking for the layer kernel");
  result.by_maps = has_bulk_copies(properties);
}

std::unique_ptr<LayerPlan> make_plan(const ShapeKey& key) {
  const RelaxedCapture relaxed;  // the first look at a kernel loads it
  const std::string reason = no_code_because(key.device);
  require(reason.empty(), ErrorKind::unsupported,
          "the tensors are on cuda:{}, and {}, or move the tensors to the CPU", key.device, reason);
  const cudaDeviceProp properties = device_properties(key.device);
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
  auto result = std::make_unique<LayerPlan>();
  result->sm_count = properties.multiProcessorCount;
  find_stream(config, properties, *result);
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

// A cache [max_positions, hidden] of which one head's columns of `box_rows` rows are copied at
// once: all that its tensor map says.
struct CacheKey {
  void* cache = nullptr;
  DType dtype = DType::float16;
  std::int64_t max_positions = 0, hidden = 0, head_dim = 0;
  int box_rows = 0;

  bool operator==(const CacheKey&) const = default;
};

CUtensorMap make_cache_map(const CacheKey& key) {
  const std::array sizes{static_cast<std::uint64_t>(key.hidden),
                         static_cast<std::uint64_t>(key.max_positions)};
  const std::array strides{static_cast<std::uint64_t>(key.hidden) * 2};
  const std::array box{static_cast<std::uint32_t>(key.head_dim),
                       static_cast<std::uint32_t>(key.box_rows)};
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

// The caches' maps, for kernels that copy by them.
void set_maps(LayerParams& params, const LayerTask& task) {
  const LayerShape& shape = task.shape;
  const int box_rows = params.stream.kv_block_positions;
  CacheKey cache{task.k_cache,      shape.dtype,    shape.max_positions,
                 shape.hidden_size, shape.head_dim, box_rows};
  params.key_map = cache_map(cache);
  cache.cache = task.v_cache;
  params.value_map = cache_map(cache);
}

void set_inputs(LayerParams& params, const LayerTask& task) {
  params.stream.activation = task.activation;
  params.stream.layer_norm_eps = task.layer_norm_eps;
  params.attention_and_up = true;
  params.k_new = task.k_new;
  params.v_new = task.v_new;
  params.k_cache = task.k_cache;
  params.v_cache = task.v_cache;
  params.cosines = task.cos;
  params.sines = task.sin;
  params.max_positions = static_cast<std::int32_t>(task.shape.max_positions);
  params.position = static_cast<std::int32_t>(task.position);
  params.device_position = task.device_position;
  params.attn_output = task.attn_output;
  params.mlp_intermediate = task.mlp_intermediate;
}

LayerParams params_for(const LayerPlan& plan, const LayerScratchView& scratch,
                       const LayerTask& task) {
  LayerParams params{};
  params.stream = plan.stream;
  params.stream.first_layer = streamed_layer(
      [&](LayerTensor tensor) { return static_cast<const char*>(task.weight(tensor)); });
  params.input = task.input;
  params.stream.bias_element_bytes = 2;
  params.stream.lamport = scratch.lamport;
  params.stream.tickets = scratch.tickets;
  params.started = scratch.started;
  return params;
}

const LayerPlan& plan_for(const LayerTask& task, int device) {
  const LayerShape& shape = task.shape;
  ShapeKey key{device,          shape.dtype,     shape.hidden_size, shape.intermediate_size,
               shape.num_heads, shape.rotary_dim};
  if (task.part == plan::Part::mlp_down) {
    // Heads do not matter here: any head size that the streaming kernel has.
    constexpr std::int64_t kHeadDim = 16;
    key.heads = std::max<std::int64_t>(shape.hidden_size / kHeadDim, 1);
  }
  return plan_for(key);
}

void launch(const LayerPlan& plan, const LayerParams& params, cudaStream_t stream) {
  launch_layer(plan.kernel, params, plan.sm_count, plan.plan.shared_bytes, stream);
}

// Where the plain kernels run, on caches of so many rows if there are any.
PlainPlace plain_place(const LayerPlan& plan, const LayerStream& where,
                       std::int64_t max_positions) {
  require(
      max_positions <= kMaxPlainPositions, ErrorKind::unsupported,
      "the caches have {} positions, and this shape takes at most {} on a GPU; move the tensors "
      "to the CPU",
      max_positions, kMaxPlainPositions);
  return {where.device_id, plan.sm_count, static_cast<cudaStream_t>(where.stream)};
}

// The second half alone, of the plan that the first half has or would have.
void run_down(const LayerPlan& plan, const LayerScratchView& scratch, const LayerTask& task,
              cudaStream_t stream) {
  LayerParams params = params_for(plan, scratch, task);
  // Blocks tell each other nothing here, so more copies may be under way, and fewer tickets do.
  constexpr std::int32_t kInFlight = 3;
  params.stream.max_in_flight = std::min(kInFlight, params.stream.stages);
  params.stream.static_percent = 60;
  params.down = true;
  params.attn_input = task.attn_output;
  params.mlp_input = task.mlp_intermediate;
  params.output = task.output;
  launch(plan, params, stream);
}

// The first half, or the whole layer in one launch.
void run_attention(const LayerPlan& plan, const LayerScratchView& scratch, const LayerTask& task,
                   cudaStream_t stream) {
  LayerParams params = params_for(plan, scratch, task);
  set_inputs(params, task);
  if (plan.by_maps) set_maps(params, task);
  params.down = task.part == plan::Part::whole;
  params.output = task.output;
  launch(plan, params, stream);
}

// The whole layer in two launches, which hand over by way of the scratch.
void run_halves(const LayerPlan& plan, const LayerScratchView& scratch, LayerTask task,
                cudaStream_t stream) {
  // What the first launch leaves for the second must not be overwritten by another thread's.
  static auto& both = *new std::mutex;
  const std::lock_guard lock(both);
  void* const output = std::exchange(task.output, nullptr);
  task.attn_output = scratch.between;
  task.mlp_intermediate = static_cast<char*>(scratch.between) + task.shape.hidden_size * 2;
  task.part = plan::Part::attention_and_mlp_up;
  run_attention(plan, scratch, task, stream);
  task.output = output;
  run_down(plan, scratch, task, stream);
}

}  // namespace

void run_layer(const LayerTask& task, const LayerStream& where) {
  const CurrentDevice device(where.device_id);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const LayerPlan& plan = plan_for(task, where.device_id);
  if (!plan.streams())
    return run_plain_layer(task, plain_place(plan, where, task.shape.max_positions));
  const std::int64_t between = (task.shape.hidden_size + task.shape.intermediate_size) * 2;
  const LayerScratchView scratch =
      layer_scratch(where.device_id, stream, plan.stream.layout.bytes, between);
  if (task.part == plan::Part::mlp_down) return run_down(plan, scratch, task, stream);
  if (task.split) return run_halves(plan, scratch, task, stream);
  run_attention(plan, scratch, task, stream);
}

}  // namespace clusterfusion::cuda
