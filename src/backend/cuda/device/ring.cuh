// A ring of stages in shared memory between one producer thread and several consumer warps.
//
// For each stage the producer waits until it is empty, announces what it will hold, and starts its
// bulk copy. Consumers see the announcement at once, and the data when it has landed: so they know
// that something is over without waiting for a copy of something else. Every consumer warp passes
// every stage, in order: the parity of the barriers cannot tell a lap from the one before last, so
// nobody may skip one. One more thread, the follower, adds what goes with the data: a stage has
// landed when both are there. Everything is handed over by mbarriers, which order what they hand
// over.
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
    int index;
    int part;
    int id;
    int unused;
  };
  std::uint64_t empty[kMaxRingStages];  // all consumers are done with what the stage held
  std::uint64_t known[kMaxRingStages];  // it is announced what it will hold
  std::uint64_t full[kMaxRingStages];   // that has landed
  alignas(16) Announcement announced[kMaxRingStages];
};

// Addresses in shared memory of what belongs to a stage.
struct RingAddresses {
  std::uint32_t control;

  __device__ __forceinline__ std::uint32_t empty(int stage) const {
    return control + offsetof(RingControl, empty) + stage * 8;
  }
  __device__ __forceinline__ std::uint32_t known(int stage) const {
    return control + offsetof(RingControl, known) + stage * 8;
  }
  __device__ __forceinline__ std::uint32_t full(int stage) const {
    return control + offsetof(RingControl, full) + stage * 8;
  }
  __device__ __forceinline__ std::uint32_t announced(int stage) const {
    return control + offsetof(RingControl, announced) + stage * 16;
  }
};

// By one thread, before a block barrier.
__device__ __forceinline__ void ring_init(RingControl* control, int stages, int consumer_warps) {
  for (int stage = 0; stage < stages; ++stage) {
    mbarrier_init(&control->empty[stage], consumer_warps);
    mbarrier_init(&control->known[stage], 1);
    mbarrier_init(&control->full[stage], 2);  // the producer and the follower
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
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %3};" ::"r"(at_.announced(stage_)),
                 "r"(label.index), "r"(label.part), "r"(id)
                 : "memory");
    mbarrier_arrive(at_.known(stage_));
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
    if (++stage_ == stages_) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  // The copy `max_in_flight` before this one must have landed. (Before the first one, the wait is
  // for the phase before a barrier's first, which counts as complete.)
  __device__ __forceinline__ void wait_for_flight() const {
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
};

// What consumers and the follower have in common: they see what is announced.
class RingReader {
 public:
  __device__ __forceinline__ RingReader(RingControl* control, const char* data, int stages,
                                        int stage_bytes)
      : at_{shared_address(control)},
        data_(shared_address(data)),
        stages_(stages),
        stage_bytes_(stage_bytes) {}

  // The id of the current stage; waits for its announcement, not for its data.
  __device__ __forceinline__ int announced() const {
    mbarrier_wait(at_.known(stage_), parity_);
    return id(stage_);
  }
  // The current stage's data, as an address in shared memory.
  __device__ __forceinline__ std::uint32_t current() const { return data_ + stage_ * stage_bytes_; }

 protected:
  // Of a stage whose announcement this thread has seen, or whose data it has seen landed.
  __device__ __forceinline__ int id(int stage) const {
    int id;
    asm volatile("ld.shared.u32 %0, [%1 + 8];" : "=r"(id) : "r"(at_.announced(stage)) : "memory");
    return id;
  }
  __device__ __forceinline__ RingLabel label(int stage) const {
    RingLabel label;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(label.index), "=r"(label.part)
                 : "r"(at_.announced(stage))
                 : "memory");
    return label;
  }
  // Goes on to the next stage.
  __device__ __forceinline__ void advance() {
    if (++stage_ < stages_) return;
    stage_ = 0;
    parity_ ^= 1;
  }

  RingAddresses at_;
  std::uint32_t data_;
  int stages_, stage_bytes_;
  int stage_ = 0;
  std::uint32_t parity_ = 0;
};

// The follower's side, held by one thread.
class RingFollower : public RingReader {
 public:
  using RingReader::RingReader;

  // What the current stage will hold; it is announced.
  __device__ __forceinline__ RingLabel label() const { return RingReader::label(stage_); }
  // Adds `bytes` at `offset` of the current stage, and goes on to the next one; none if 0.
  __device__ __forceinline__ void add(std::uint32_t offset, const void* source,
                                      std::uint32_t bytes) {
    const std::uint32_t full = at_.full(stage_);
    if (bytes == 0) {
      mbarrier_arrive(full);
    } else {
      mbarrier_arrive_expect(full, bytes);
      bulk_copy_to_shared(current() + offset, source, bytes, full);
    }
    advance();
  }
};

// A consumer's side, held by every thread of the consumer warps.
class RingConsumer : public RingReader {
 public:
  using RingReader::RingReader;

  // Waits until the current stage has landed.
  __device__ __forceinline__ RingLabel wait() const {
    mbarrier_wait(at_.full(stage_), parity_);
    return label(stage_);
  }
  // What the stage behind the current one holds, which has landed.
  __device__ __forceinline__ RingLabel next_label() const {
    return label(stage_ + 1 == stages_ ? 0 : stage_ + 1);
  }
  // Whether the stage behind the current one has landed, and holds `id`. For whole warps.
  __device__ __forceinline__ bool next_landed(int id) const {
    const bool wraps = stage_ + 1 == stages_;
    const int stage = wraps ? 0 : stage_ + 1;
    if (!__all_sync(0xffffffffu, mbarrier_test(at_.full(stage), wraps ? parity_ ^ 1 : parity_)))
      return false;
    return RingReader::id(stage) == id;
  }
  // The current stage's data, as a pointer.
  __device__ __forceinline__ char* current_data() const {
    return static_cast<char*>(__cvta_shared_to_generic(current()));
  }
  // The next stage's data.
  __device__ __forceinline__ std::uint32_t next() const {
    return data_ + (stage_ + 1 == stages_ ? 0 : stage_ + 1) * stage_bytes_;
  }
  // This warp is done with the stage, or with it and the next one.
  __device__ __forceinline__ void release(int lane, bool two = false) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(at_.empty(stage_));
    advance();
    if (!two) return;
    if (lane == 0) mbarrier_arrive(at_.empty(stage_));
    advance();
  }
};

}  // namespace clusterfusion::device
