// What interventions, and a look at activations, do to rows of activations on a GPU. A row is one
// token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// LayerIntervention's steering of one layer, on the device.
struct DeviceSteering {
  const float* rows = nullptr;  // [positions, hidden], or [hidden] if `everywhere`; null: none
  std::int32_t positions = 0;
  std::int32_t everywhere = 0;
};

// x[row] += what steers position first_position + row, for x[count, hidden].
void launch_steer(float* x, const DeviceSteering& steering, std::int64_t first_position,
                  std::int64_t count, std::int64_t hidden, cudaStream_t stream);

// x += y over `count` values.
void launch_add(float* x, const float* y, std::int64_t count, cudaStream_t stream);

// output[count, hidden] = the norm of x[count, hidden], in float32; weight and bias (or null)
// [hidden] are of `dtype`. Mean and variance in two passes.
void launch_final_norm(DType dtype, NormKind kind, const float* x, const void* weight,
                       const void* bias, float eps, float* output, std::int64_t count,
                       std::int64_t hidden, cudaStream_t stream);

// The biases of the second MLP matrices, for decode steps. All of layer 0; those of the next layer
// lie layer_stride bytes further.
struct SteeredBiases {
  const char* model_biases = nullptr;  // float32 [hidden]; null: the model has none
  char* steered_biases = nullptr;      // float32 [hidden]
  std::int64_t layer_stride = 0;
  const DeviceSteering* steering = nullptr;    // [layers], on the device
  const std::int32_t* ablated_mlps = nullptr;  // [layers], on the device: 1 where there is no MLP
  std::int32_t layers = 0, hidden = 0;
};
// steered_biases[layer] = model's (zero for an ablated MLP) + what steers `position` before the
// next layer
void launch_steer_biases(const SteeredBiases& biases, std::int32_t position, cudaStream_t stream);

}  // namespace clusterfusion::cuda
