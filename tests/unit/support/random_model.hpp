// Models that live in memory, with random weights, for tests and benchmarks.
#pragma once

#include <cstdint>
#include <memory>

#include "clusterfusion/model.hpp"

namespace clusterfusion::test {

struct RandomModelOptions {
  std::uint64_t seed = 1;
  DType vector_dtype = DType::float32;  // of biases and LayerNorm parameters
  float matrix_scale = 1.0f;            // matrices are uniform in +-scale x sqrt(3 / columns)
};

// A model of any shape whose weights are random numbers of `config.dtype`, owned by it. LayerNorm
// weights lie about 1, biases and LayerNorm biases about 0. config.head_dim is filled in if 0.
std::shared_ptr<const Model> make_random_model(ModelConfig config,
                                               const RandomModelOptions& options = {});

// Small enough to test, and of EleutherAI/pythia's usual form.
ModelConfig small_config();
// Of the Llama layout with all its options: separate and grouped heads wider than the hidden size,
// norms of queries and keys, biases of these, a gated MLP.
ModelConfig small_llama_config();
// The shape of EleutherAI/pythia-410m.
ModelConfig pythia_410m_config();

// Bits of `value` in a 16-bit type, to the nearest, ties to even, and back.
std::uint16_t narrow(float value, DType dtype);
float widen(std::uint16_t bits, DType dtype);

}  // namespace clusterfusion::test
