// What a device computes for the fused decoder-layer calls (clusterfusion/ops.hpp).
//
// src/ops has checked everything that the host can know: shapes, dtypes, one device, row-major and
// 16-byte-aligned tensors, a free row in the caches, and that nothing written overlaps anything
// else. So an implementation computes and checks nothing but what only it knows (the architecture,
// sizes that its kernels do not cover), before it launches anything. It may be called from several
// threads, and on several streams, at once.
#pragma once

#include <array>
#include <cstdint>

#include "clusterfusion/model.hpp"
#include "plan/layer_program.hpp"

namespace clusterfusion {

// Where the work goes. On the CPU both are 0.
struct LayerStream {
  int device_id = 0;       // to be made current for the launch
  void* stream = nullptr;  // cudaStream_t
};

// Where keys or values lie in a caller's cache, [pages, page_size, num_kv_heads, head_dim]: strides
// are in elements, and a head's values lie side by side. A cache that has no pages is one.
struct CacheLayout {
  std::int64_t pages = 1;
  std::int64_t page_size = 0;  // positions
  std::int64_t page_stride = 0;
  std::int64_t position_stride = 0;
  std::int64_t head_stride = 0;

  bool operator==(const CacheLayout&) const = default;
};

// A call: a layer of any spec, or a part of it, for one new token of each of some rows. Pointers
// are to the first element; those that the part does not need are null.
struct LayerWork {
  plan::Part part = plan::Part::whole;  // or attention_and_mlp_up, or mlp_down
  LayerSpec spec;
  DType dtype = DType::float16;  // float16 or bfloat16, of everything but cos, sin and integers
  std::int64_t rows = 1;
  bool split = false;  // two launches instead of one, where the whole layer would be one

  // By LayerTensor, with the shapes of layer_tensors(). Biases of matrices may be null.
  std::array<const void*, kNumLayerTensors> weights{};
  const void* input = nullptr;  // [rows, hidden]
  const float* cos = nullptr;   // [rows, rotary_stride]: the first rotary_dim count
  const float* sin = nullptr;   // likewise
  std::int64_t rotary_stride = 0;

  void* k_cache = nullptr;  // keys after RoPE
  void* v_cache = nullptr;
  CacheLayout cache;  // of both
  // [rows, max_pages], rows block_table_stride apart: the pages of each row, from position 0 on.
  // Null: all rows have the one page that there is.
  const std::int32_t* block_table = nullptr;
  std::int64_t max_pages = 1;
  std::int64_t block_table_stride = 0;

  // Positions that the caches hold of each row, which is its new token's number: `position`,
  // checked, unless `positions` [rows] is given, which nobody has checked, and which lies where the
  // work runs. A row whose position is outside [0, max_pages * page_size), or one of whose pages up
  // to it is outside [0, pages), has NaN in all results, and its keys and values are not written.
  std::int64_t position = 0;
  const std::int32_t* positions = nullptr;

  void* k_new = nullptr;  // [rows, num_kv_heads, head_dim]: what the caches get
  void* v_new = nullptr;  // [rows, num_kv_heads, head_dim]
  // What attention_and_mlp_up gives, and mlp_down takes.
  void* attn_output = nullptr;       // [rows, hidden]: with bias, without residual
  void* mlp_intermediate = nullptr;  // [rows, intermediate]: after the activation, and the gate
  void* output = nullptr;            // [rows, hidden]: of the whole layer and of mlp_down

  constexpr const void* weight(LayerTensor tensor) const { return weights[index_of(tensor)]; }
};

namespace cpu {
void run_layer(const LayerWork& work);
}  // namespace cpu

// In builds with CUDA. Enqueues and returns: no synchronisation, no allocation that a stream
// capture would not allow. Errors: unsupported, for a device or sizes that the kernels do not
// cover.
namespace cuda {
void run_layer(const LayerWork& work, const LayerStream& stream);
}  // namespace cuda

}  // namespace clusterfusion
