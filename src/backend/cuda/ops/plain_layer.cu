#include <mutex>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/ops/layer_scratch.hpp"
#include "backend/cuda/ops/plain_attention.cuh"
#include "backend/cuda/ops/plain_layer.hpp"
#include "backend/cuda/ops/plain_products.cuh"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

template <typename T>
using Kernel = void (*)(T);

// Each kernel waits by itself for the one before it.
template <typename Params>
void launch(Kernel<Params> kernel, dim3 grid, cudaStream_t stream, const Params& params) {
  const DependentLaunch how(grid, dim3(kPlainThreads), 0, stream);
  check(cudaLaunchKernelEx(how.config(), kernel, params), "starting a plain layer kernel");
}

unsigned blocks_of_elements(std::int64_t elements) {
  return static_cast<unsigned>((elements + kPlainThreads - 1) / kPlainThreads);
}

unsigned row_blocks(std::int64_t rows) { return static_cast<unsigned>(blocks_of_rows(rows)); }

template <typename T>
Kernel<PlainParams> attention_kernel(const LayerShape& shape) {
  // Then each head's part of a row is a multiple of 16 bytes, and begins at one.
  const bool aligned = shape.head_dim % kVectorElements == 0;
  return aligned ? attend_split<T, kVectorElements> : attend_split<T, 1>;
}

dim3 attention_grid(const PlainParams& p) {
  const LayerShape& shape = p.task.shape;
  const std::int64_t count = shape.head_dim % kVectorElements == 0 ? kVectorElements : 1;
  const std::int64_t slabs = blocks_of_elements(shape.head_dim / count);
  return dim3(static_cast<unsigned>(shape.num_heads), static_cast<unsigned>(p.splits),
              static_cast<unsigned>(slabs));
}

// What one call hands from launch to launch must not be overwritten by another thread's on the same
// stream, so the launches of a call follow each other.
std::mutex& launches() {
  static auto& mutex = *new std::mutex;  // never destroyed: calls may still come at the end
  return mutex;
}

PlainParams params_for(const LayerTask& task, const PlainPlace& place) {
  const LayerShape& shape = task.shape;
  PlainParams p{};
  p.task = task;
  p.sm_count = place.sm_count;
  p.splits = most_plain_splits(shape, place.sm_count);
  p.layout = plain_layout(shape, p.splits);
  const auto bytes = p.layout.size * static_cast<std::int64_t>(sizeof(float));
  p.scratch = static_cast<float*>(layer_scratch(place.device, place.stream, 0, bytes).between);
  return p;
}

// The launches of a call. From the last one the caller gets the projected attention, or the output
// of the whole layer.
template <typename T>
void enqueue(const PlainParams& p, cudaStream_t stream) {
  const LayerShape& shape = p.task.shape;
  const dim3 elements(blocks_of_elements(shape.hidden_size));
  launch(normalise_input<T>, elements, stream, p);
  launch(multiply_normed<T>,
         dim3(row_blocks(3 * shape.hidden_size) + row_blocks(shape.intermediate_size)), stream, p);
  launch(rotate_and_store_new<T>, elements, stream, p);
  launch(attention_kernel<T>(shape), attention_grid(p), stream, p);
  launch(combine_splits, elements, stream, p);
  const Kernel<PlainParams> last = p.task.output == nullptr ? project_attention<T> : add_halves<T>;
  launch(last, dim3(row_blocks(shape.hidden_size)), stream, p);
}

}  // namespace

void load_plain_kernels(DType dtype) {
  with_type(dtype, [](auto type) {
    using T = decltype(type);
    const auto load_one = [](auto kernel) {
      cudaFuncAttributes attributes;
      check(cudaFuncGetAttributes(&attributes, kernel), "loading a plain layer kernel");
    };
    load_one(normalise_input<T>);
    load_one(multiply_normed<T>);
    load_one(rotate_and_store_new<T>);
    load_one(attend_split<T, kVectorElements>);
    load_one(attend_split<T, 1>);
    load_one(combine_splits);
    load_one(project_attention<T>);
    load_one(add_halves<T>);
    load_one(add_mlp_down<T>);
  });
}

void run_plain_layer(const LayerTask& task, const PlainPlace& place) {
  with_type(task.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (task.part == plan::Part::mlp_down)
      return launch(add_mlp_down<T>, dim3(row_blocks(task.shape.hidden_size)), place.stream, task);
    const PlainParams p = params_for(task, place);
    const std::lock_guard lock(launches());
    enqueue<T>(p, place.stream);
  });
}

}  // namespace clusterfusion::cuda
