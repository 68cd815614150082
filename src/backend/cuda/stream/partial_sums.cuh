// How the consumer warps hand their sums of a chunk to the reducers: buffers in shared memory, each
// with two mbarriers and a reducer. Every warp writes its own sums into a buffer.
#pragma once

#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

struct PartialSums {
  static constexpr int kBuffers = plan::kPartialBuffers;
  static_assert(kBuffers == kReducerWarps);

  // float32 [rows, kChunkRows].
  __device__ __forceinline__ static float* of_warp(char* scratch, int buffer, int warp, int rows) {
    return reinterpret_cast<float*>(scratch) +
           (buffer * plan::kConsumerWarps + warp) * rows * plan::kChunkRows;
  }
};

// A consumer warp's side.
class PartialWriter {
 public:
  using Sums = PartialSums;

  __device__ __forceinline__ PartialWriter(StreamShared* shared, char* scratch)
      : control_(shared), scratch_(scratch) {}

  // Where this warp's sums of the next chunk go, when the buffer is free.
  __device__ __forceinline__ float* begin(int warp, int rows) {
    mbarrier_wait(&control_->partial_empty[buffer_], parity_ ^ 1);
    return Sums::of_warp(scratch_, buffer_, warp, rows);
  }
  // They are there.
  __device__ __forceinline__ void end(int warp, int lane, int id, int chunk) {
    if (warp == 0 && lane == 0) control_->partial_what[buffer_] = make_int2(id, chunk);
    __syncwarp();
    if (kEveryLaneArrives || lane == 0) mbarrier_arrive(&control_->partial_full[buffer_]);
    if (++buffer_ < Sums::kBuffers) return;
    buffer_ = 0;
    parity_ ^= 1;
  }
  // Tells every reducer something that is no chunk.
  __device__ __forceinline__ void tell_all(int warp, int lane, int id) {
    for (int i = 0; i < Sums::kBuffers; ++i) {
      begin(warp, 0);
      end(warp, lane, id, 0);
    }
  }
  // Waits until the reducers have taken all that any warp has written: the buffers may be used for
  // something else, up to the next begin().
  __device__ __forceinline__ void drain() const {
    for (int buffer = 0; buffer < Sums::kBuffers; ++buffer)
      mbarrier_wait(&control_->partial_empty[buffer], (buffer < buffer_ ? parity_ : parity_ ^ 1));
  }

 private:
  StreamShared* control_;
  char* scratch_;
  int buffer_ = 0;
  std::uint32_t parity_ = 0;
};

}  // namespace clusterfusion::cuda::stream
