// A ring of stages in shared memory between one producer thread and several consumer warps.
//
// For each stage the producer waits until it is empty, announces what it will hold, and starts its
// bulk copy. Consumers see the announcement at once, and the data when it has landed: so they know
// that something is over without waiting for a copy of something else. Every consumer warp passes
// every stage, in order: the parity of the barriers cannot tell a lap from the one before last, so
// nobody may skip one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device/bulk_copy.cuh"
#include "backend/cuda/device/mbarrier.cuh"

namespace clusterfusion::device {

inline constexpr int kMaxRingStages = 16;
inline constexpr int kRingEnd = -1;  // the id behind the last stage

// What a stage holds: the numbers are the users' business.
struct RingLabel {
  int index;
  int part;
};

// Lies in shared memory.
struct RingControl {
  struct Announcement {
    int id;
    int sequence;  // of all stages since the beginning: tells a new announcement from an old one
    int index;
    int part;
  };
  std::uint64_t full[kMaxRingStages];
  std::uint64_t empty[kMaxRingStages];
  alignas(16) Announcement announced[kMaxRingStages];
};

// Addresses in shared memory of what belongs to a stage.
struct RingAddresses {
  std::uint32_t control;

  __device__ __forceinline__ std::uint32_t full(int stage) const {
    return control + offsetof(RingControl, full) + stage * 8;
  }
  __device__ __forceinline__ std::uint32_t empty(int stage) const {
    return control + offsetof(RingControl, empty) + stage * 8;
  }
  __device__ __forceinline__ std::uint32_t announced(int stage) const {
    return control + offsetof(RingControl, announced) + stage * 16;
  }
};

// By one thread, before a block barrier.
__device__ __forceinline__ void ring_init(RingControl* control, int stages, int consumer_warps) {
  for (int stage = 0; stage < stages; ++stage) {
    mbarrier_init(&control->full[stage], 1);
    mbarrier_init(&control->empty[stage], consumer_warps);
    control->announced[stage].sequence = -1;
  }
  mbarrier_fence_init();
}

// The producer's side, held by one thread.
class RingProducer {
 public:
  // `max_in_flight` copies may be under way; more make everything else in the memory system slow.
  __device__ __forceinline__ RingProducer(RingControl* control, const char* data, int stages,
                                          int stage_bytes, int max_in_flight)
      : at_{shared_address(control)},
        data_(shared_address(data)),
        stages_(stages),
        stage_bytes_(stage_bytes),
        max_in_flight_(max_in_flight) {}

  // The next stage will hold this.
  __device__ __forceinline__ void announce(int id, const RingLabel& label) {
    mbarrier_wait(at_.empty(stage_), parity_);
    const std::uint32_t address = at_.announced(stage_);
    asm volatile("st.shared.v2.u32 [%0 + 8], {%1, %2};" ::"r"(address), "r"(label.index),
                 "r"(label.part)
                 : "memory");
    asm volatile("st.volatile.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(id), "r"(sequence_)
                 : "memory");
  }

  // Copies what was announced last, and goes on to the next stage.
  __device__ __forceinline__ void copy(const void* source, std::uint32_t bytes) {
    copy_with(bytes, [&](std::uint32_t target, std::uint32_t barrier) {
      bulk_copy_to_shared(target, source, bytes, barrier);
    });
  }
  // The same with copies of the caller's that bring `bytes` to a target and tell a barrier, both
  // addresses in shared memory.
  template <typename Copies>
  __device__ __forceinline__ void copy_with(std::uint32_t bytes, Copies&& copies) {
    const std::uint32_t full = at_.full(stage_);
    const std::uint32_t target = data_ + stage_ * stage_bytes_;
    mbarrier_arrive_expect(full, bytes);
    wait_for_flight();
    copies(target, full);
    ++sequence_;
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  // The copy `max_in_flight` before this one must have landed.
  __device__ __forceinline__ void wait_for_flight() const {
    if (sequence_ < max_in_flight_) return;
    int earlier = stage_ - max_in_flight_;
    std::uint32_t its_parity = parity_ ^ 1;
    if (earlier < 0) {
      earlier += stages_;
      its_parity ^= 1;
    }
    mbarrier_wait(at_.full(earlier), its_parity);
  }

  RingAddresses at_;
  std::uint32_t data_;
  int stages_, stage_bytes_, max_in_flight_;
  int stage_ = 0;
  std::uint32_t parity_ = 1;  // of `empty`: the first lap finds every stage empty
  int sequence_ = 0;
};

// A consumer's side, held by every thread of the consumer warps.
class RingConsumer {
 public:
  __device__ __forceinline__ RingConsumer(RingControl* control, const char* data, int stages,
                                          int stage_bytes)
      : at_{shared_address(control)},
        data_(shared_address(data)),
        stages_(stages),
        stage_bytes_(stage_bytes) {}

  // The id of the current stage; waits for its announcement, not for its data.
  __device__ __forceinline__ int announced() const {
    int id, sequence;
    do {
      asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(id), "=r"(sequence)
                   : "r"(at_.announced(stage_))
                   : "memory");
    } while (sequence != sequence_);
    return id;
  }
  // Waits until the current stage has landed.
  __device__ __forceinline__ RingLabel wait() const {
    mbarrier_wait(at_.full(stage_), parity_);
    RingLabel label;
    const std::uint32_t address = at_.announced(stage_);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 8];"
                 : "=r"(label.index), "=r"(label.part)
                 : "r"(address)
                 : "memory");
    return label;
  }
  // Whether the stage behind the current one has landed, and holds `id`. For whole warps.
  __device__ __forceinline__ bool next_landed(int id) const {
    const bool wraps = stage_ + 1 == stages_;
    const int stage = wraps ? 0 : stage_ + 1;
    if (!__all_sync(0xffffffffu, mbarrier_test(at_.full(stage), wraps ? parity_ ^ 1 : parity_)))
      return false;
    int its_id;
    asm volatile("ld.volatile.shared.u32 %0, [%1];"
                 : "=r"(its_id)
                 : "r"(at_.announced(stage))
                 : "memory");
    return its_id == id;
  }
  // The current stage's data, as an address in shared memory and as a pointer.
  __device__ __forceinline__ std::uint32_t current() const { return data_ + stage_ * stage_bytes_; }
  __device__ __forceinline__ char* current_data() const {
    return static_cast<char*>(__cvta_shared_to_generic(current()));
  }
  // The next stage's data.
  __device__ __forceinline__ std::uint32_t next() const {
    return data_ + (stage_ + 1 == stages_ ? 0 : stage_ + 1) * stage_bytes_;
  }
  // This warp is done with the stage.
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(at_.empty(stage_));
    ++sequence_;
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  RingAddresses at_;
  std::uint32_t data_;
  int stages_, stage_bytes_;
  int stage_ = 0;
  std::uint32_t parity_ = 0;
  int sequence_ = 0;
};

}  // namespace clusterfusion::device
