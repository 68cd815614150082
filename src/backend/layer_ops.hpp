// What a device computes for the fused decoder-layer calls (clusterfusion/ops.hpp).
//
// src/ops has checked everything that the host can know: shapes, dtypes, one device, row-major and
// 16-byte-aligned tensors, a free row in the caches, and that nothing written overlaps anything
// else. So an implementation computes and checks nothing but what only it knows (the architecture,
// sizes that its kernels do not cover), before it launches anything. It may be called from several
// threads, and on several streams, at once.
#pragma once

#include <cstdint>

#include "clusterfusion/model.hpp"

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

// What attention and the MLP's first half read, and the keys and values that they write. Matrices
// are row-major [out, in]; pointers are to the first element.
struct LayerInputs {
  LayerShape shape;
  Activation activation = Activation::gelu_erf;
  float layer_norm_eps = 1e-5f;

  const void* input = nullptr;           // [hidden]
  const void* weight_qkv = nullptr;      // [3 hidden, hidden]: rows are q, k, v of head 0, ...
  const void* bias_qkv = nullptr;        // [3 hidden] or null
  const void* weight_o = nullptr;        // [hidden, hidden]
  const void* bias_o = nullptr;          // [hidden] or null
  void* k_cache = nullptr;               // [max_positions, hidden]; keys after RoPE
  void* v_cache = nullptr;               // [max_positions, hidden]
  const void* ln_weight = nullptr;       // [hidden]
  const void* ln_bias = nullptr;         // [hidden]
  const float* cos = nullptr;            // [rotary_dim]
  const float* sin = nullptr;            // [rotary_dim]
  const void* post_ln_weight = nullptr;  // [hidden]
  const void* post_ln_bias = nullptr;    // [hidden]
  const void* mlp_up_weight = nullptr;   // [intermediate, hidden]
  const void* mlp_up_bias = nullptr;     // [intermediate]

  // Positions that the caches hold, which is the new one's number: `position`, checked, unless
  // `device_position` is given. That lies on the device, is read when the work runs, and nobody has
  // checked it: outside [0, max_positions) the results are NaN and the caches stay as they are.
  std::int64_t position = 0;
  const std::int32_t* device_position = nullptr;

  void* k_new = nullptr;  // [num_heads, head_dim]: row `position` of k_cache
  void* v_new = nullptr;  // [num_heads, head_dim]: row `position` of v_cache
};

struct AttentionMlpUpTask {
  LayerInputs inputs;
  void* attn_output = nullptr;       // [hidden]: with bias, without residual
  void* mlp_intermediate = nullptr;  // [intermediate]: after the activation
};

struct MlpDownTask {
  DType dtype = DType::float16;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  const void* hidden_states = nullptr;     // [hidden]
  const void* attn_output = nullptr;       // [hidden]
  const void* mlp_intermediate = nullptr;  // [intermediate]
  const void* mlp_down_weight = nullptr;   // [hidden, intermediate]
  const void* mlp_down_bias = nullptr;     // [hidden]
  void* output = nullptr;                  // [hidden]
};

struct DecoderLayerTask {
  LayerInputs inputs;
  const void* mlp_down_weight = nullptr;  // [hidden, intermediate]
  const void* mlp_down_bias = nullptr;    // [hidden]
  void* output = nullptr;                 // [hidden]
  bool split = false;                     // a launch for each half instead of one for both
};

namespace cpu {
void attention_mlp_up(const AttentionMlpUpTask& task);
void mlp_down(const MlpDownTask& task);
void decoder_layer(const DecoderLayerTask& task);
}  // namespace cpu

// In builds with CUDA. They enqueue and return: no synchronisation, no allocation that a stream
// capture would not allow.
// Errors: unsupported, for a device or a shape that the kernels do not cover.
namespace cuda {
void attention_mlp_up(const AttentionMlpUpTask& task, const LayerStream& stream);
void mlp_down(const MlpDownTask& task, const LayerStream& stream);
void decoder_layer(const DecoderLayerTask& task, const LayerStream& stream);
}  // namespace cuda

}  // namespace clusterfusion
