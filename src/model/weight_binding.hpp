// From the names of a checkpoint's tensors to the model's weights.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "clusterfusion/model.hpp"
#include "io/tensor_store.hpp"

namespace clusterfusion {

// The shapes that the views of a ModelWeights point at; addresses stay as they are.
using ShapeStorage = std::deque<std::array<std::int64_t, 2>>;

struct NamedTensor {
  std::string name;  // as the checkpoint spells it
  std::string file;
  DLTensor view;
};

// Bytes of tensors that could not be used in place; addresses stay as they are.
using TensorCopies = std::deque<std::vector<std::byte>>;

struct BoundWeights {
  ModelWeights weights;
  std::vector<NamedTensor> tensors;   // all that `weights` points at, each once
  TensorCopies copies;                // what some of them point at, in place of the store
  std::vector<std::string> warnings;  // Model::warnings()
};

// Views of all of the model's tensors in `store`, which must outlive them. A tensor that begins at
// no multiple of its element's size is copied.
//
// Names are those of the family of config.model_type, with or without its prefix. What the family
// ignores (buffers of old versions) is passed over; any other tensor that the configuration has no
// place for is an error, because leaving it out would compute something else than the checkpoint's
// author meant.
//
// Sets config.dtype. Where config.json ties the embeddings but the checkpoint holds an LM head, the
// head counts (transformers does the same); if it differs from the embedding,
// config.tied_embeddings becomes false.
//
// Errors: malformed (missing or unexpected tensors, wrong shapes), unsupported (dtypes, strides).
BoundWeights bind_weights(const TensorStore& store, ModelConfig& config, ShapeStorage& shapes);

}  // namespace clusterfusion
