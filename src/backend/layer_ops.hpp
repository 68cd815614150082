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

struct LayerShape {
  DType dtype = DType::float16;  // float16 or bfloat16, of everything but cos, sin and position
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t rotary_dim = 0;     // even, 0 to head_dim
  std::int64_t max_positions = 0;  // rows of the caches
};

// Where the work goes. On the CPU both are 0.
struct LayerStream {
  int device_id = 0;       // to be made current for the launch
  void* stream = nullptr;  // cudaStream_t
};

// A call: the layer with the parallel residual, or a part of it, for one new token. Pointers are to
// the first element; those that the part does not need are null.
struct LayerTask {
  plan::Part part = plan::Part::whole;  // or attention_and_mlp_up, or mlp_down
  LayerShape shape;
  Activation activation = Activation::gelu_erf;
  float layer_norm_eps = 1e-5f;
  bool split = false;  // two launches instead of one, where the whole layer would be one

  // By LayerTensor, with the shapes of layer_tensors(). The biases of attention may be null.
  std::array<const void*, kNumLayerTensors> weights{};
  const void* input = nullptr;  // [hidden]
  void* k_cache = nullptr;      // [max_positions, hidden]; keys after RoPE
  void* v_cache = nullptr;      // [max_positions, hidden]
  const float* cos = nullptr;   // [rotary_dim]
  const float* sin = nullptr;   // [rotary_dim]

  // Positions that the caches hold, which is the new one's number: `position`, checked, unless
  // `device_position` is given. That lies on the device, is read when the work runs, and nobody has
  // checked it: outside [0, max_positions) the results are NaN and the caches stay as they are.
  std::int64_t position = 0;
  const std::int32_t* device_position = nullptr;

  void* k_new = nullptr;  // [num_heads, head_dim]: row `position` of k_cache
  void* v_new = nullptr;  // [num_heads, head_dim]: row `position` of v_cache
  // What attention_and_mlp_up gives, and mlp_down takes.
  void* attn_output = nullptr;       // [hidden]: with bias, without residual
  void* mlp_intermediate = nullptr;  // [intermediate]: after the activation
  void* output = nullptr;            // [hidden]: of the whole layer and of mlp_down

  constexpr const void* weight(LayerTensor tensor) const { return weights[index_of(tensor)]; }
};

namespace cpu {
void run_layer(const LayerTask& task);
}  // namespace cpu

// In builds with CUDA. Enqueues and returns: no synchronisation, no allocation that a stream
// capture would not allow. Errors: unsupported, for a device or a shape that the kernels do not
// cover.
namespace cuda {
void run_layer(const LayerTask& task, const LayerStream& stream);
}  // namespace cuda

}  // namespace clusterfusion
