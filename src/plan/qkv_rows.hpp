// The one QKV matrix that the kernels of a GPU read, out of the matrices of a checkpoint.
#pragma once

#include <cstdint>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion::plan {

// Rows of a matrix that follow each other; of its bias, the values of the same numbers.
struct MatrixRows {
  LayerTensor weight{};
  std::int64_t first = 0, count = 0;
};

// What makes the matrix of QkvLayout::by_kv_head, in its order: LayerSpec::qkv_size() rows.
std::vector<MatrixRows> qkv_rows(const LayerSpec& spec);

// The model as it is where its matrices have been put together like that.
ModelConfig with_gathered_qkv(ModelConfig config);

}  // namespace clusterfusion::plan
