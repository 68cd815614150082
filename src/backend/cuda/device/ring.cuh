// A ring of stages in shared memory between a dealer, a producer (a thread each, of different
// warps) and several consumer warps.
//
// For each stage the dealer waits until it is empty, announces what it will hold, and adds what
// goes with the data. The producer copies what is announced, a few copies at a time; it has
// nothing else to do, so the next copy begins as soon as one has landed. Consumers see the
// announcement at once, and the data when it has landed: so they know that something is over
// without waiting for a copy of something else. Every consumer warp passes every stage, in order:
// the parity of the barriers cannot tell a lap from the one before last, so nobody may skip one.
// Everything is handed over by mbarriers, which order what they hand over.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/device/bulk_copy.cuh"
#include "backend/cuda/device/mbarrier.cuh"

namespace clusterfusion::device {

// compute-sanitizer's racecheck follows an mbarrier only for the threads that arrive at it. Built for
// it (CLUSTERFUSION_RACECHECK), every lane of a warp says for itself that it is done with a stage;
// else one does for all, behind a __syncwarp().
#ifdef CLUSTERFUSION_RACECHECK
inline constexpr bool kEveryLaneArrives = true;
#else
inline constexpr bool kEveryLaneArrives = false;
#endif

inline constexpr int kMaxRingStages = 16;
inline constexpr int kRingEnd = -1;  // the id behind the last stage

// What a stage holds: the numbers are the users' business.
struct RingLabel {
  int index;
  int part;
};
// What the producer is to copy. `source` is an address, or what the users' own copies make of it.
struct RingOrder {
  int id;
  std::uint32_t bytes;
  std::uint64_t source;
};

// Lies in shared memory.
struct RingControl {
  struct Announcement {
    int index;
    int part;
    int id;
    std::uint32_t bytes;
  };
  std::uint64_t empty[kMaxRingStages];  // all consumers are done with what the stage held
  std::uint64_t known[kMaxRingStages];  // it is announced what it will hold
  std::uint64_t full[kMaxRingStages];   // that has landed
  alignas(16) Announcement announced[kMaxRingStages];
  std::uint64_t source[kMaxRingStages];
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
  __device__ __forceinline__ std::uint32_t source(int stage) const {
    return control + offsetof(RingControl, source) + stage * 8;
  }
};

// By one thread, before a block barrier.
__device__ __forceinline__ void ring_init(RingControl* control, int stages, int consumer_warps) {
  for (int stage = 0; stage < stages; ++stage) {
    mbarrier_init(&control->empty[stage], consumer_warps * (kEveryLaneArrives ? 32 : 1));
    mbarrier_init(&control->known[stage], 1);
    mbarrier_init(&control->full[stage], 2);  // the dealer and the producer
  }
  mbarrier_fence_init();
}

// What everybody in a ring has in common: a place, which goes from stage to stage.
class RingPlace {
 public:
  __device__ __forceinline__ RingPlace(RingControl* control, const char* data, int stages,
                                       int stage_bytes)
      : at_{shared_address(control)},
        data_(shared_address(data)),
        stages_(stages),
        stage_bytes_(stage_bytes) {}

  // The current stage's data, as an address in shared memory.
  __device__ __forceinline__ std::uint32_t current() const { return data_ + stage_ * stage_bytes_; }

 protected:
  // Goes on to the next stage.
  __device__ __forceinline__ void advance() {
    if (++stage_ < stages_) return;
    stage_ = 0;
    parity_ ^= 1;
  }
  // Waits until what went into the ring `stages` stages before the current one has landed; for
  // who has seen that stage empty, or announced, since. (Before the first lap the wait is for the
  // phase before a barrier's first, which counts as complete.)
  __device__ __forceinline__ void wait_for_earlier(int stages) const {
    int earlier = stage_ - stages;
    std::uint32_t its_parity = parity_;
    if (earlier < 0) {
      earlier += stages_;
      its_parity ^= 1;
    }
    mbarrier_wait(at_.full(earlier), its_parity);
  }

  RingAddresses at_;
  std::uint32_t data_;
  int stages_, stage_bytes_;
  int stage_ = 0;
  std::uint32_t parity_ = 0;
};

// What is announced of a stage.
struct RingAnnouncement {
  int index;
  int id;
};

// A stage as it was when somebody looked.
struct RingPeek {
  bool landed;
  int id, index;  // if landed

  // Whether it has landed, and holds `id`. For whole warps.
  __device__ __forceinline__ bool holds(int id) const {
    return __all_sync(0xffffffffu, landed) && this->id == id;
  }
};

// The dealer's side, held by one thread.
class RingDealer : public RingPlace {
 public:
  // At most `reach` stages are announced and have not landed.
  __device__ __forceinline__ RingDealer(RingControl* control, const char* data, int stages,
                                        int stage_bytes, int reach)
      : RingPlace(control, data, stages, stage_bytes), reach_(min(reach, stages)) {}

  // The current stage will hold this.
  __device__ __forceinline__ void announce(const RingLabel& label, const RingOrder& order) {
    mbarrier_wait(at_.empty(stage_), parity_ ^ 1);  // the first lap finds every stage empty
    wait_for_earlier(reach_);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at_.announced(stage_)),
                 "r"(label.index), "r"(label.part), "r"(order.id), "r"(order.bytes)
                 : "memory");
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(at_.source(stage_)), "l"(order.source) : "memory");
    mbarrier_arrive(at_.known(stage_));
  }
  // Adds `bytes` at `offset` of the current stage, none if 0, and goes on to the next one.
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

 private:
  int reach_;
};

// The producer's side, held by one thread.
class RingProducer : public RingPlace {
 public:
  // `max_in_flight` copies may be under way; more make everything else in the memory system slow.
  __device__ __forceinline__ RingProducer(RingControl* control, const char* data, int stages,
                                          int stage_bytes, int max_in_flight)
      : RingPlace(control, data, stages, stage_bytes), max_in_flight_(max_in_flight) {}

  // What the current stage will hold; waits for its announcement.
  __device__ __forceinline__ RingOrder next() const {
    mbarrier_wait(at_.known(stage_), parity_);
    RingOrder order;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 8];"
                 : "=r"(order.id), "=r"(order.bytes)
                 : "r"(at_.announced(stage_))
                 : "memory");
    asm volatile("ld.shared.u64 %0, [%1];"
                 : "=l"(order.source)
                 : "r"(at_.source(stage_))
                 : "memory");
    return order;
  }
  // Waits until one more copy may be under way, lets copies(target, barrier) start what brings
  // `bytes` (both are addresses in shared memory), and goes on to the next stage.
  template <typename Copies>
  __device__ __forceinline__ void copy(std::uint32_t bytes, Copies&& copies) {
    const std::uint32_t full = at_.full(stage_);
    mbarrier_arrive_expect(full, bytes);
    wait_for_earlier(max_in_flight_);
    copies(current(), full);
    advance();
  }

 private:
  int max_in_flight_;
};

// A consumer's side, held by every thread of the consumer warps.
class RingConsumer : public RingPlace {
 public:
  using RingPlace::RingPlace;

  // The id of the current stage; waits for its announcement, not for its data.
  __device__ __forceinline__ int announced() const {
    mbarrier_wait(at_.known(stage_), parity_);
    return id(stage_);
  }
  // The same, with the index.
  __device__ __forceinline__ RingAnnouncement announcement() const {
    return announcement(stage_, parity_);
  }
  // Of the stage behind the current one.
  __device__ __forceinline__ RingAnnouncement next_announcement() const {
    return announcement(next_stage(), next_parity());
  }
  // Waits until the current stage, or the one behind it, has landed.
  __device__ __forceinline__ void wait_landed() const { mbarrier_wait(at_.full(stage_), parity_); }
  __device__ __forceinline__ void wait_next_landed() const {
    mbarrier_wait(at_.full(next_stage()), next_parity());
  }
  __device__ __forceinline__ RingLabel wait() const {
    wait_landed();
    return label(stage_);
  }
  // Looks at the current stage, or at the one behind it, without waiting for anything.
  __device__ __forceinline__ RingPeek peek() const { return peek(stage_, parity_); }
  __device__ __forceinline__ RingPeek peek_next() const {
    return peek(next_stage(), next_parity());
  }
  // The current stage's data, as a pointer.
  __device__ __forceinline__ char* current_data() const {
    return static_cast<char*>(__cvta_shared_to_generic(current()));
  }
  // The next stage's data.
  __device__ __forceinline__ std::uint32_t next() const {
    return data_ + next_stage() * stage_bytes_;
  }
  // This warp is done with the stage, or with it and the next one.
  __device__ __forceinline__ void release(int lane, bool two = false) {
    __syncwarp();
    const bool arrives = kEveryLaneArrives || lane == 0;
    if (arrives) mbarrier_arrive(at_.empty(stage_));
    advance();
    if (!two) return;
    if (arrives) mbarrier_arrive(at_.empty(stage_));
    advance();
  }

 private:
  __device__ __forceinline__ int next_stage() const {
    return stage_ + 1 == stages_ ? 0 : stage_ + 1;
  }
  __device__ __forceinline__ std::uint32_t next_parity() const {
    return stage_ + 1 == stages_ ? parity_ ^ 1 : parity_;
  }
  __device__ __forceinline__ RingAnnouncement announcement(int stage, std::uint32_t parity) const {
    mbarrier_wait(at_.known(stage), parity);
    return announced(stage);
  }
  __device__ __forceinline__ RingPeek peek(int stage, std::uint32_t parity) const {
    const bool landed = mbarrier_test(at_.full(stage), parity);
    const RingAnnouncement what = announced(stage);
    return {landed, what.id, what.index};
  }
  // Of a stage whose announcement this thread has seen, or whose data it has seen landed.
  __device__ __forceinline__ RingAnnouncement announced(int stage) const {
    RingAnnouncement announcement;
    [[maybe_unused]] int part, bytes;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(announcement.index), "=r"(part), "=r"(announcement.id), "=r"(bytes)
                 : "r"(at_.announced(stage))
                 : "memory");
    return announcement;
  }
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
};

}  // namespace clusterfusion::device
