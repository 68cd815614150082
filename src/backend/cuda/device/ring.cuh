// A ring of stages in shared memory between one producer thread and several consumer warps.
//
// The producer waits for a stage to be empty, labels it, and starts its bulk copy (or none: a
// marker). Every consumer warp passes every stage, in order: the parity of the barriers cannot tell
// a lap from the one before last, so nobody may skip one.
#pragma once

#include <cstdint>

#include "backend/cuda/device/bulk_copy.cuh"
#include "backend/cuda/device/mbarrier.cuh"

namespace clusterfusion::device {

inline constexpr int kMaxRingStages = 16;

// What a stage holds: `kind` is the phase's business, `index` and `part` say which piece.
struct RingLabel {
  int kind;
  int index;
  int part;
  int last;  // of this index
};

// Lies in shared memory.
struct RingControl {
  std::uint64_t full[kMaxRingStages];
  std::uint64_t empty[kMaxRingStages];
  RingLabel label[kMaxRingStages];
};

// By one thread, before a block barrier.
__device__ __forceinline__ void ring_init(RingControl* control, int stages, int consumer_warps) {
  for (int stage = 0; stage < stages; ++stage) {
    mbarrier_init(&control->full[stage], 1);
    mbarrier_init(&control->empty[stage], consumer_warps);
  }
  mbarrier_fence_init();
}

// The producer's side, held by one thread.
struct RingProducer {
  RingControl* control;
  char* data;
  int stages;
  int stage_bytes;
  int max_in_flight;  // copies that may be under way; more make barriers elsewhere slow
  int stage = 0;
  std::uint32_t parity = 1;  // of `empty`: the first lap finds every stage empty
  int pushed = 0;

  __device__ __forceinline__ void push(const RingLabel& label, const void* source,
                                       std::uint32_t bytes) {
    mbarrier_wait(&control->empty[stage], parity);
    wait_for_flight();
    control->label[stage] = label;
    if (bytes != 0) {
      mbarrier_arrive_expect(&control->full[stage], bytes);
      bulk_copy_to_shared(data + stage * stage_bytes, source, bytes, &control->full[stage]);
    } else {
      mbarrier_arrive(&control->full[stage]);
    }
    ++pushed;
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

 private:
  // The copy that was pushed `max_in_flight` ago must have landed.
  __device__ __forceinline__ void wait_for_flight() {
    if (pushed < max_in_flight) return;
    int earlier = stage - max_in_flight;
    std::uint32_t its_parity = parity ^ 1;
    if (earlier < 0) {
      earlier += stages;
      its_parity ^= 1;
    }
    mbarrier_wait(&control->full[earlier], its_parity);
  }
};

// A consumer's side, held by every thread of the consumer warps.
struct RingConsumer {
  RingControl* control;
  char* data;
  int stages;
  int stage_bytes;
  int stage = 0;
  std::uint32_t parity = 0;

  // Waits until the current stage has landed.
  __device__ __forceinline__ RingLabel wait() {
    mbarrier_wait(&control->full[stage], parity);
    return control->label[stage];
  }
  __device__ __forceinline__ char* current() const { return data + stage * stage_bytes; }
  // This warp is done with the stage.
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&control->empty[stage]);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace clusterfusion::device
