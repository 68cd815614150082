// Where the candidates for a row's next token lie.
#pragma once

#include "backend/cuda/decode/candidate.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

using cuda::better, cuda::best_of_lanes, cuda::candidate, cuda::worst_candidate;

__device__ __forceinline__ std::uint64_t* candidates_of(const StreamParams& p, int epoch, int row) {
  return reinterpret_cast<std::uint64_t*>(lamport_set(p, epoch) + p.layout.candidates) +
         static_cast<std::int64_t>(row) * gridDim.x * kReducerWarps * 2;
}

}  // namespace clusterfusion::cuda::stream
