// The order of activations in memory.
#pragma once

namespace clusterfusion::cuda {

// Where element `index` of a vector of activations lies: of each 8, the words (pairs) 1 and 2
// change places, so that the words of an operand of the tensor cores lie side by side.
__device__ __forceinline__ int operand_order(int index) {
  return (index & ~6) | (index & 2) << 1 | (index & 4) >> 1;
}

}  // namespace clusterfusion::cuda
