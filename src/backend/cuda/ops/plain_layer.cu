#include <mutex>
#include <type_traits>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/ops/layer_scratch.hpp"
#include "backend/cuda/ops/plain_attention.cuh"
#include "backend/cuda/ops/plain_layer.hpp"
#include "backend/cuda/ops/plain_products.cuh"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

using Kernel = void (*)(PlainParams);

// Each kernel waits by itself for the one before it.
void launch(Kernel kernel, dim3 grid, cudaStream_t stream, const PlainParams& params) {
  const DependentLaunch how(grid, dim3(kPlainThreads), 0, stream);
  check(cudaLaunchKernelEx(how.config(), kernel, params), "starting a plain layer kernel");
}

unsigned blocks_of_elements(std::int64_t elements) {
  return static_cast<unsigned>((elements + kPlainThreads - 1) / kPlainThreads);
}

unsigned row_blocks(std::int64_t rows) { return static_cast<unsigned>(blocks_of_rows(rows)); }

// Whether each head's keys and values at each position begin at a multiple of 16 bytes, and are one
// long. Where there is but one head or page, nothing is a stride away.
bool has_aligned_heads(const LayerWork& work) {
  const CacheLayout& cache = work.cache;
  const auto is_aligned = [](std::int64_t elements) { return elements % kVectorElements == 0; };
  return is_aligned(work.spec.head_dim) && is_aligned(cache.position_stride) &&
         (cache.pages == 1 || is_aligned(cache.page_stride)) &&
         (work.spec.kv_heads() == 1 || is_aligned(cache.head_stride));
}

template <typename T>
void launch_attention(const PlainParams& p, cudaStream_t stream) {
  const bool aligned = has_aligned_heads(p.work);
  const std::int64_t count = aligned ? kVectorElements : 1;
  const dim3 grid(static_cast<unsigned>(p.work.rows * p.shape.heads),
                  static_cast<unsigned>(p.splits), blocks_of_elements(p.shape.head_dim / count));
  launch(aligned ? attend_split<T, kVectorElements> : attend_split<T, 1>, grid, stream, p);
}

// Calls `use` with the number of tokens that the kernels for so many rows take at once.
template <typename Use>
void with_tokens(std::int64_t rows, Use&& use) {
  switch (tokens_at_once(rows)) {
    case 1: return use(std::integral_constant<int, 1>{});
    case 4: return use(std::integral_constant<int, 4>{});
    default: return use(std::integral_constant<int, 16>{});
  }
}

// What one call hands from launch to launch must not be overwritten by another thread's on the same
// stream, so the launches of a call follow each other.
std::mutex& launches() {
  static auto& mutex = *new std::mutex;  // never destroyed: calls may still come at the end
  return mutex;
}

PlainParams params_for(const LayerWork& work, const PlainPlace& place) {
  PlainParams p{};
  p.work = work;
  p.shape = plain_shape(work.spec);
  p.norm_eps = static_cast<float>(work.spec.layer_norm_eps);
  p.sm_count = place.sm_count;
  if (work.part == plan::Part::mlp_down) return p;
  p.splits = most_plain_splits(p.shape, work.max_pages * work.cache.page_size, place.sm_count);
  p.layout = plain_layout(p.shape, tokens_at_once(work.rows), p.splits);
  const auto bytes = p.layout.size * static_cast<std::int64_t>(sizeof(float));
  p.scratch = static_cast<float*>(layer_scratch(place.device, place.stream, 0, bytes).between);
  return p;
}

// Launches what a half begins with, or what both do: norms, and the products behind them.
template <int kTokens, typename T>
void enqueue_normed(PlainParams p, bool of_attention, bool of_mlp, cudaStream_t stream) {
  p.of_attention = of_attention;
  p.of_mlp = of_mlp;
  const auto rows = static_cast<unsigned>(p.work.rows);
  launch(normalise<T>, dim3(blocks_of_elements(p.shape.hidden), rows), stream, p);
  const std::int64_t blocks = (of_attention ? qkv_blocks(p.shape, p.work.spec.qkv_layout) : 0) +
                              (of_mlp ? blocks_of_rows(p.shape.intermediate) : 0);
  launch(multiply_normed<kTokens, T>, dim3(static_cast<unsigned>(blocks)), stream, p);
}

// The launches of a call. From the last one the caller gets the projected attention, or the MLP's
// activations where it follows attention, or the output of the whole layer.
template <int kTokens, typename T>
void enqueue(const PlainParams& p, cudaStream_t stream) {
  constexpr std::int64_t kHeadsPerBlock = kPlainThreads / 32;
  const PlainShape& shape = p.shape;
  const auto rows = static_cast<unsigned>(p.work.rows);
  const bool parallel = p.work.spec.parallel_residual;
  const bool whole = p.work.part == plan::Part::whole;
  const dim3 hidden_rows(row_blocks(shape.hidden));
  enqueue_normed<kTokens, T>(p, /*of_attention=*/true, /*of_mlp=*/parallel, stream);
  const std::int64_t heads = shape.heads + 2 * shape.kv_heads;
  launch(rotate_and_store_new<T>,
         dim3(static_cast<unsigned>((heads + kHeadsPerBlock - 1) / kHeadsPerBlock), rows), stream,
         p);
  launch_attention<T>(p, stream);
  launch(combine_splits, dim3(blocks_of_elements(shape.attention), rows), stream, p);
  if (!parallel || !whole) launch(project_attention<kTokens, T>, hidden_rows, stream, p);
  if (!parallel) enqueue_normed<kTokens, T>(p, /*of_attention=*/false, /*of_mlp=*/true, stream);
  if (whole) launch(add_halves<kTokens, T>, hidden_rows, stream, p);
}

void load_kernel(Kernel kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "loading a plain layer kernel");
}

template <int kTokens, typename T>
void load_products() {
  for (const Kernel kernel : {multiply_normed<kTokens, T>, project_attention<kTokens, T>,
                              add_halves<kTokens, T>, add_mlp_down<kTokens, T>})
    load_kernel(kernel);
}

}  // namespace

void load_plain_kernels(DType dtype) {
  with_type(dtype, [](auto type) {
    using T = decltype(type);
    for (const Kernel kernel : {normalise<T>, rotate_and_store_new<T>,
                                attend_split<T, kVectorElements>, attend_split<T, 1>})
      load_kernel(kernel);
    load_kernel(combine_splits);
    load_products<1, T>();
    load_products<4, T>();
    load_products<16, T>();
  });
}

void run_plain_layer(const LayerWork& work, const PlainPlace& place) {
  with_type(work.dtype, [&](auto type) {
    using T = decltype(type);
    with_tokens(work.rows, [&](auto tokens) {
      constexpr int kTokens = tokens;
      if (work.part == plan::Part::mlp_down) {
        return launch(add_mlp_down<kTokens, T>, dim3(row_blocks(work.spec.hidden_size)),
                      place.stream, params_for(work, place));
      }
      const PlainParams p = params_for(work, place);
      const std::lock_guard lock(launches());
      enqueue<kTokens, T>(p, place.stream);
    });
  });
}

}  // namespace clusterfusion::cuda
