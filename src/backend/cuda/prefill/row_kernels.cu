#include <cmath>
#include <utility>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/prefill/row_kernels.hpp"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/with_type.cuh"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {
namespace {

using device::start_dependents;
using device::wait_for_dependencies;
using device::warp_max;
using device::warp_sum;

constexpr int kThreads = 256;
constexpr int kScoreThreads = 1024;

unsigned blocks_for(std::int64_t items) {
  return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

// Calls `launch` with a value of the 16-bit type, and looks at the last error.
template <typename Launch>
void with_type(DType dtype, const char* doing, Launch&& launch) {
  cuda::with_type(dtype, launch);
  check(cudaGetLastError(), doing);
}

// Blocks of kThreads. The kernel waits for the one before it by itself.
template <typename... Params, typename... Arguments>
void launch_dependent(void (*kernel)(Params...), dim3 grid, cudaStream_t stream,
                      Arguments&&... arguments) {
  const DependentLaunch launch(grid, dim3(kThreads), 0, stream);
  // Its error is also the last one, which with_type() looks at.
  cudaLaunchKernelEx(launch.config(), kernel, std::forward<Arguments>(arguments)...);
}

// Four floats, rounded.
template <typename T>
__device__ __forceinline__ uint2 pack_four(float4 value) {
  return make_uint2(pack<T>(value.x, value.y), pack<T>(value.z, value.w));
}

// Over a block of kWarps warps, in a fixed order; every thread gets the sum. Two calls in a row
// need different `partial`.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float (&partial)[kWarps]) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
  return total;
}

template <typename T>
__global__ void embed(const PromptRow* rows, const T* embedding, float* x, int hidden) {
  const auto* from = reinterpret_cast<const uint2*>(
      embedding + static_cast<std::int64_t>(rows[blockIdx.x].token) * hidden);
  auto* to = reinterpret_cast<float4*>(x + static_cast<std::int64_t>(blockIdx.x) * hidden);
  for (int i = threadIdx.x; i < hidden / 4; i += kThreads) {
    const uint2 four = from[i];
    const float2 low = unpack<T>(four.x);
    const float2 high = unpack<T>(four.y);
    to[i] = make_float4(low.x, low.y, high.x, high.y);
  }
}

// Of a row, four elements each, that a thread has: for Pythia's widths, and for the widest.
constexpr int kFewNormVectors = 5;
constexpr int kNormVectors = kMaxNormWidth / 4 / kThreads;

template <typename T, int kVectors>
__device__ __forceinline__ void write_normalised(const float4 (&x)[kVectors], float mean,
                                                 float inverse_deviation, const NormOutput& output,
                                                 int hidden) {
  auto* row = static_cast<uint2*>(output.rows) + static_cast<std::int64_t>(blockIdx.x) * hidden / 4;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = threadIdx.x + v * kThreads;
    if (i >= hidden / 4) continue;
    const uint2 weight = __ldg(static_cast<const uint2*>(output.weight) + i);
    const uint2 bias = output.bias == nullptr ? make_uint2(0, 0)
                                              : __ldg(static_cast<const uint2*>(output.bias) + i);
    const auto one = [&](float value, float weight, float bias) {
      return fmaf((value - mean) * inverse_deviation, weight, bias);
    };
    const float2 w0 = unpack<T>(weight.x), w1 = unpack<T>(weight.y);
    const float2 b0 = unpack<T>(bias.x), b1 = unpack<T>(bias.y);
    row[i] = pack_four<T>(make_float4(one(x[v].x, w0.x, b0.x), one(x[v].y, w0.y, b0.y),
                                      one(x[v].z, w1.x, b1.x), one(x[v].w, w1.y, b1.y)));
  }
}

// One block a row; mean and deviation in two passes over registers: safe for any mean. RMSNorm
// takes the squares around zero.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads)
    normalise(NormKind kind, const float* rows, const std::int32_t* chosen, const NormOutput first,
              const NormOutput second, float eps, int hidden) {
  __shared__ float partial[2][kThreads / 32];
  wait_for_dependencies();
  const std::int64_t from = chosen == nullptr ? blockIdx.x : chosen[blockIdx.x];
  const auto* row = reinterpret_cast<const float4*>(rows + from * hidden);
  float4 x[kVectors];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = threadIdx.x + v * kThreads;
    x[v] = i < hidden / 4 ? row[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    sum += (x[v].x + x[v].y) + (x[v].z + x[v].w);
  }
  const float mean = kind == NormKind::rms_norm ? 0.0f : block_sum(sum, partial[0]) / hidden;
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (threadIdx.x + v * kThreads >= hidden / 4) continue;
    const float4 d = make_float4(x[v].x - mean, x[v].y - mean, x[v].z - mean, x[v].w - mean);
    squares += (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
  }
  const float variance = block_sum(squares, partial[1]) / hidden;
  const float inverse_deviation = rsqrtf(variance + eps);
  write_normalised<T, kVectors>(x, mean, inverse_deviation, first, hidden);
  if (second.rows != nullptr)
    write_normalised<T, kVectors>(x, mean, inverse_deviation, second, hidden);
}

// Where the key of a row lies in the cache of `Stored`; its value lies block_bytes / 2 behind.
template <typename Stored>
__device__ __forceinline__ char* cached_key(const PromptCache& cache, PromptRow place, int kv_head,
                                            int head_dim) {
  const int slot = place.position % plan::kKvPagePositions;
  const int in_block = slot & ((1 << cache.log2_block) - 1);
  return cache.pages[place.first_page + place.position / plan::kKvPagePositions] +
         cache.layer_offset + static_cast<std::int64_t>(kv_head) * cache.head_bytes +
         (slot >> cache.log2_block) * cache.block_bytes +
         in_block * head_dim * static_cast<int>(sizeof(Stored));
}

// A head behind its RMSNorm. Each thread sums up the squares by itself, in one order.
template <typename T>
class NormedHead {
 public:
  __device__ __forceinline__ NormedHead(const float* vector, const void* weight, float eps,
                                        int head_dim)
      : vector_(vector), weight_(static_cast<const T*>(weight)) {
    float4 squares = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int dim = 0; dim < head_dim; dim += 4) {
      const float4 x = *reinterpret_cast<const float4*>(vector + dim);
      squares = make_float4(fmaf(x.x, x.x, squares.x), fmaf(x.y, x.y, squares.y),
                            fmaf(x.z, x.z, squares.z), fmaf(x.w, x.w, squares.w));
    }
    const float sum = (squares.x + squares.y) + (squares.z + squares.w);
    scale_ = rsqrtf(sum / static_cast<float>(head_dim) + eps);
  }
  __device__ __forceinline__ float operator[](int dim) const {
    return vector_[dim] * scale_ * static_cast<float>(weight_[dim]);
  }

 private:
  const float* vector_;
  const T* weight_;
  float scale_;
};

// Element `dim` of a head after the rotation: transformers' rotate_half on its first `rotary_dim`.
template <typename Head>
__device__ __forceinline__ float rotated(const Head& head, int dim, const float2* angles,
                                         int half) {
  if (dim >= 2 * half) return head[dim];
  const bool low = dim < half;
  const float2 angle = __ldg(angles + (low ? dim : dim - half));
  const float other = low ? -head[dim + half] : head[dim - half];
  return head[dim] * angle.x + other * angle.y;
}

template <typename Stored>
__device__ __forceinline__ void store_four(char* to, float4 value) {
  if constexpr (sizeof(Stored) == 4)
    *reinterpret_cast<float4*>(to) = value;
  else
    *reinterpret_cast<uint2*>(to) = pack_four<Stored>(value);
}

// A thread takes 4 neighbouring elements; blockIdx.y is the row. Queries, keys and values are kept
// as `Stored`: T, or float. Attention comes next and may wait on the multiprocessors already.
template <typename T, typename Stored, bool kHasNorms>
__global__ void __launch_bounds__(kThreads)
    rotate_and_store(const RotaryParams r, const AttentionParams p, const HeadNorms norms) {
  const PromptRow place = r.rows[blockIdx.y];
  start_dependents();
  wait_for_dependencies();
  const int group = p.heads_per_kv_head;
  const int parts = group + 2;  // of a head of keys and values: its queries, its key, its value
  const int width = p.num_heads / group * parts * p.head_dim;
  const int column = 4 * static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (column >= width) return;
  const int row = blockIdx.y;
  const int kv_head = column / (parts * p.head_dim);
  const int part = column / p.head_dim - parts * kv_head;
  const int dim = column % p.head_dim;
  const float* vector = r.qkv + static_cast<std::int64_t>(row) * width + (column - dim);
  float4 value = *reinterpret_cast<const float4*>(vector + dim);
  if (place.position < 0) return;
  if (part <= group && (kHasNorms || dim < r.rotary_dim)) {
    const int half = r.rotary_dim / 2;
    const float2* angles = r.rotary + static_cast<std::int64_t>(place.position) * half;
    const auto rotate_four = [&](const auto& head) {
      return make_float4(rotated(head, dim, angles, half), rotated(head, dim + 1, angles, half),
                         rotated(head, dim + 2, angles, half),
                         rotated(head, dim + 3, angles, half));
    };
    if constexpr (kHasNorms)
      value = rotate_four(
          NormedHead<T>(vector, part < group ? norms.query : norms.key, norms.eps, p.head_dim));
    else
      value = rotate_four(vector);
  }
  char* target;
  if (part < group) {
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
    value = make_float4(value.x * scale, value.y * scale, value.z * scale, value.w * scale);
    target = static_cast<char*>(p.query) +
             (static_cast<std::int64_t>(row) * p.num_heads + kv_head * group + part) * p.head_dim *
                 static_cast<std::int64_t>(sizeof(Stored));
  } else {
    target = cached_key<Stored>(p.cache, place, kv_head, p.head_dim);
    if (part > group) target += p.cache.block_bytes / 2;
  }
  store_four<Stored>(target + dim * static_cast<int>(sizeof(Stored)), value);
}

// One block a row.
__global__ void __launch_bounds__(kScoreThreads)
    score_rows(const float* logits, const std::int32_t* targets, RowScore* scores, int vocab) {
  constexpr int kWarps = kScoreThreads / 32;
  __shared__ float largest[kWarps];
  __shared__ float partial[kWarps];
  const float* row = logits + static_cast<std::int64_t>(blockIdx.x) * vocab;
  float maximum = -INFINITY;
  bool finite = true;
  for (int i = threadIdx.x; i < vocab; i += kScoreThreads) {
    finite = finite && isfinite(row[i]);
    maximum = fmaxf(maximum, row[i]);
  }
  maximum = warp_max(maximum);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = maximum;
  finite = __syncthreads_and(finite);
  for (int warp = 0; warp < kWarps; ++warp) maximum = fmaxf(maximum, largest[warp]);
  const std::int32_t target = targets[blockIdx.x];
  float sum = 0.0f;
  bool is_beaten = target < 0 || row[target] < maximum;
  for (int i = threadIdx.x; i < vocab; i += kScoreThreads) {
    sum += expf(row[i] - maximum);
    is_beaten = is_beaten || (i < target && row[i] == maximum);
  }
  is_beaten = __syncthreads_or(is_beaten);
  sum = block_sum(sum, partial);
  if (threadIdx.x != 0) return;
  const float logprob = target < 0 ? 0.0f : row[target] - maximum - logf(sum);
  scores[blockIdx.x] = {logprob, finite, !is_beaten};
}

}  // namespace

void launch_embed(DType dtype, const PromptRow* rows, const void* embedding, float* x,
                  std::int64_t count, std::int64_t hidden, cudaStream_t stream) {
  with_type(dtype, "starting the embedding", [&](auto type) {
    using T = decltype(type);
    embed<T><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
        rows, static_cast<const T*>(embedding), x, static_cast<int>(hidden));
  });
}

void launch_norm(const NormParams& params, const NormOutput& first, const NormOutput& second,
                 cudaStream_t stream) {
  with_type(params.dtype, "starting a norm", [&](auto type) {
    using T = decltype(type);
    const bool few = params.hidden <= std::int64_t{kFewNormVectors} * 4 * kThreads;
    const auto kernel = few ? normalise<T, kFewNormVectors> : normalise<T, kNormVectors>;
    launch_dependent(kernel, dim3(static_cast<unsigned>(params.count)), stream, params.kind,
                     params.x, params.rows, first, second, params.eps,
                     static_cast<int>(params.hidden));
  });
}

void launch_rotary(DType dtype, const RotaryParams& rotary, const HeadNorms& norms,
                   const AttentionParams& attention, cudaStream_t stream) {
  const std::int32_t group = attention.heads_per_kv_head;
  const std::int32_t width = attention.num_heads / group * (group + 2) * attention.head_dim;
  const dim3 grid(blocks_for(width / 4), static_cast<unsigned>(rotary.count));
  with_type(dtype, "starting the rotation", [&](auto type) {
    using T = decltype(type);
    const bool has_norms = norms.query != nullptr;
    auto* kernel = has_norms ? rotate_and_store<T, T, true> : rotate_and_store<T, T, false>;
    if (attention.cache.dtype == DType::float32)
      kernel = has_norms ? rotate_and_store<T, float, true> : rotate_and_store<T, float, false>;
    launch_dependent(kernel, grid, stream, rotary, attention, norms);
  });
}

void launch_score(const float* logits, const std::int32_t* targets, RowScore* scores,
                  std::int64_t count, std::int64_t vocab, cudaStream_t stream) {
  score_rows<<<static_cast<unsigned>(count), kScoreThreads, 0, stream>>>(logits, targets, scores,
                                                                         static_cast<int>(vocab));
  check(cudaGetLastError(), "starting the scores");
}

}  // namespace clusterfusion::cuda
