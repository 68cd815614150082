// Changing what a model computes on the way: steering and ablation.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace clusterfusion {

// What is added to the residual stream before one layer, in prefill and in every decode step
// (activation addition: https://arxiv.org/abs/2308.10248).
struct SteeringVector {
  std::int64_t layer = 0;
  // float32: [hidden_size], added at every position; or, if `positions` is above 0, row-major
  // [positions, hidden_size], of which row i is added at position i of each sequence; positions
  // behind the last row stay as they are.
  std::vector<float> values;
  std::int64_t positions = 0;
};

// Parts of layers whose outputs become zero (zero ablation). A head's is what attention gives it,
// before the output projection, whose bias stays; an MLP's is all that it would add to the residual
// stream, its bias included.
struct Ablation {
  std::map<std::int64_t, std::vector<std::int64_t>> heads;  // numbers of heads, by layer
  std::vector<std::int64_t> mlps;                           // layers
};

}  // namespace clusterfusion
