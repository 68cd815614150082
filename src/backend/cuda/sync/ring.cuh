// A circular buffer of stages in shared memory between a scheduler and a producer (a thread each,
// of different warps) and several consumer warps, with three mbarriers a stage: empty, announced,
// full.
//
// For each stage the scheduler waits until it is empty, announces what it will hold, and adds what
// goes with the data. The producer copies what is announced, a few copies at a time; it has
// nothing else to do, so the next copy begins as soon as one has landed. Consumers see the
// announcement at once, and the data when it has landed: so they know that a phase is over without
// waiting for a copy of the next. Every consumer warp passes every stage, in order: the parity of
// the barriers cannot tell a lap from the one before last, so nobody may skip one.
//
// How data comes in is said here alone. One thread starts bulk copies, and `full` counts their
// bytes. Where there are none (kBulkCopies), all lanes of the producer's warp copy 16 bytes at a
// time, as the scheduler does for what it adds, and each arrives at `full` behind its own copies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/bulk_copy.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/ptx/l2_policy.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"

namespace clusterfusion::device {

// compute-sanitizer's racecheck follows an mbarrier only for the threads that arrive at it. Built
// for it (CLUSTERFUSION_RACECHECK), every lane of a warp says for itself that it is done with a
// stage; else one does for all, behind a __syncwarp().
#ifdef CLUSTERFUSION_RACECHECK
inline constexpr bool kEveryLaneArrives = true;
#else
inline constexpr bool kEveryLaneArrives = false;
#endif

// Threads that produce, of one warp.
inline constexpr int kProducerLanes = kBulkCopies ? 1 : 32;

// Whether this thread is one of them; for the producer's whole warp.
__device__ __forceinline__ bool is_producer() {
  if constexpr (kBulkCopies)
    return elect_one();
  else
    return true;
}

// What the copies into a stage are told: the barrier that counts them, an address in shared memory,
// and what L2 does with the lines (l2_policy()).
struct StageCopies {
  std::uint32_t barrier;
  std::uint64_t policy;
};

// Copies `bytes` to `target`, in the stage that `copies` tells of; by all who produce. Both
// addresses and the size are multiples of 16.
__device__ __forceinline__ void copy_to_stage(std::uint32_t target, const void* global,
                                              std::uint32_t bytes, const StageCopies& copies) {
  if constexpr (kBulkCopies)
    bulk_copy_to_shared(target, global, bytes, copies.barrier, copies.policy);
  else
    copy_by_warp(target, global, bytes, copies.policy);
}

inline constexpr int kMaxRingStages = 16;
inline constexpr int kRingEnd = -1;  // the id behind the last stage

// What a stage holds: the numbers are the users' business.
struct RingLabel {
  int first;
  int second;
};
// What the producer is to copy. `source` is an address, or what the users' own copies make of it.
struct RingOrder {
  int id;
  std::uint32_t bytes;
  std::uint64_t source;
  int in_flight;  // so many copies may be under way, this one included
};
__device__ __forceinline__ std::uint64_t address_of(const char* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}
__device__ __forceinline__ const char* pointer_to(std::uint64_t address) {
  return reinterpret_cast<const char*>(address);
}
// The same as the producer gets it: with the stage's data, as an address in shared memory.
struct RingTask {
  RingOrder order;
  std::uint32_t target;
};

// Lies in shared memory. All of a stage lies side by side, so that one address serves for it.
struct RingControl {
  struct alignas(64) Stage {
    std::uint64_t empty;  // all consumers are done with what the stage held
    std::uint64_t known;  // it is announced what it will hold
    std::uint64_t full;   // that has landed
    std::uint64_t source;
    // What consumers look at, in one piece.
    struct alignas(16) Announcement {
      RingLabel label;
      int id;
      std::uint32_t data;  // the stage's data, as an address in shared memory: always the same
    } announced;
    std::uint32_t bytes;
    int in_flight;
  };
  Stage stages[kMaxRingStages];
};

// By one thread, before a block barrier.
__device__ __forceinline__ void ring_init(RingControl* control, const char* data, int stages,
                                          int stage_bytes, int consumer_warps) {
  for (int i = 0; i < stages; ++i) {
    RingControl::Stage& stage = control->stages[i];
    mbarrier_init(&stage.empty, consumer_warps * (kEveryLaneArrives ? 32 : 1));
    mbarrier_init(&stage.known, 1);
    mbarrier_init(&stage.full, 1 + kProducerLanes);  // the scheduler and who produces
    stage.announced.data = shared_address(data + i * stage_bytes);
  }
  mbarrier_fence_init();
}

// What all roles have in common: a cursor, which goes from stage to stage.
class RingCursor {
 public:
  __device__ __forceinline__ RingCursor(RingControl* control, int stages)
      : begin_(shared_address(control)), end_(begin_ + stages * kStep), stage_(begin_) {}

  // Behind the last copy that this thread starts: it must not end before its copies have landed.
  __device__ __forceinline__ void finish() const {
    if constexpr (!kBulkCopies) wait_for_copies();
  }

 protected:
  using Stage = RingControl::Stage;
  static constexpr std::uint32_t kStep = sizeof(Stage);

  // Addresses in shared memory of what belongs to the stage at `stage`.
  __device__ __forceinline__ static std::uint32_t empty(std::uint32_t stage) {
    return stage + offsetof(Stage, empty);
  }
  __device__ __forceinline__ static std::uint32_t known(std::uint32_t stage) {
    return stage + offsetof(Stage, known);
  }
  __device__ __forceinline__ static std::uint32_t full(std::uint32_t stage) {
    return stage + offsetof(Stage, full);
  }
  __device__ __forceinline__ static std::uint32_t announced(std::uint32_t stage) {
    return stage + offsetof(Stage, announced);
  }
  __device__ __forceinline__ static std::uint32_t id_of(std::uint32_t stage) {
    return announced(stage) + offsetof(Stage::Announcement, id);
  }
  __device__ __forceinline__ static std::uint32_t data_of(std::uint32_t stage) {
    return announced(stage) + offsetof(Stage::Announcement, data);
  }
  __device__ __forceinline__ static std::uint32_t source(std::uint32_t stage) {
    return stage + offsetof(Stage, source);
  }
  __device__ __forceinline__ static std::uint32_t bytes(std::uint32_t stage) {
    return stage + offsetof(Stage, bytes);
  }

  // Goes on to the next stage.
  __device__ __forceinline__ void advance() {
    stage_ += kStep;
    if (stage_ != end_) return;
    stage_ = begin_;
    parity_ ^= 1;
  }
  // Waits until what went into the ring `stages` stages before the current one has landed; for
  // who has seen that stage empty, or announced, since. (Before the first lap the wait is for the
  // phase before a barrier's first, which counts as complete.)
  __device__ __forceinline__ void wait_for_earlier(int stages) const {
    std::uint32_t earlier = stage_ - stages * kStep;
    std::uint32_t its_parity = parity_;
    if (static_cast<std::int32_t>(earlier - begin_) < 0) {
      earlier += end_ - begin_;
      its_parity ^= 1;
    }
    mbarrier_wait(full(earlier), its_parity);
  }

  // Addresses in shared memory.
  std::uint32_t begin_, end_;
  std::uint32_t stage_;  // the current one
  std::uint32_t parity_ = 0;
};

// What is announced of a stage.
struct RingAnnouncement {
  int id;
  RingLabel label;
  std::uint32_t data;  // an address in shared memory
};

// A stage as it was when somebody looked.
struct RingPeek {
  bool landed;
  RingAnnouncement what;  // if landed

  // Whether it has landed, and holds `id`. For whole warps.
  __device__ __forceinline__ bool holds(int id) const {
    return __all_sync(0xffffffffu, landed) && what.id == id;
  }
};

// The scheduler's side, held by one thread.
class RingScheduler : public RingCursor {
 public:
  using RingCursor::RingCursor;

  // Waits until the current stage may be announced: consumers are done with what it held, and of
  // those before it fewer than `reach` (at most as many as there are) have not landed. Returns its
  // data, as an address in shared memory.
  __device__ __forceinline__ std::uint32_t wait_empty(int reach) const {
    mbarrier_wait(empty(stage_), parity_ ^ 1);  // the first lap finds every stage empty
    wait_for_earlier(reach);
    std::uint32_t data;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(data) : "r"(data_of(stage_)) : "memory");
    return data;
  }
  // The current stage, which is empty, will hold this.
  __device__ __forceinline__ void announce(const RingLabel& label, const RingOrder& order) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(announced(stage_)), "r"(label.first),
                 "r"(label.second)
                 : "memory");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(id_of(stage_)), "r"(order.id) : "memory");
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(source(stage_)), "l"(order.source) : "memory");
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(bytes(stage_)), "r"(order.bytes),
                 "r"(order.in_flight)
                 : "memory");
    mbarrier_arrive(known(stage_));
  }
  // Nothing comes behind the current stage, which is empty and stays so.
  __device__ __forceinline__ void announce_end() {
    announce({}, {kRingEnd, 0, 0, 0});
    finish();
  }
  // Brings `count` bytes to `target`, in the current stage; none if 0. Goes on to the next one.
  __device__ __forceinline__ void add(std::uint32_t target, const void* from, std::uint32_t count) {
    const std::uint32_t barrier = full(stage_);
    if (count == 0) {
      mbarrier_arrive(barrier);
    } else if constexpr (kBulkCopies) {
      mbarrier_arrive_expect(barrier, count);
      bulk_copy_to_shared(target, from, count, barrier);
    } else {
      const auto* source = static_cast<const char*>(from);
      for (std::uint32_t at = 0; at < count; at += 16) copy_16(target + at, source + at);
      mbarrier_arrive_behind_copies(barrier);
    }
    advance();
  }
};

// The producer's side, held by kProducerLanes threads.
class RingProducer : public RingCursor {
 public:
  // `reads_once`: what is copied is not read again before L2 has forgotten it.
  __device__ __forceinline__ RingProducer(RingControl* control, int stages, bool reads_once)
      : RingCursor(control, stages), policy_(l2_policy(reads_once)) {}

  // What the current stage will hold; waits for its announcement.
  __device__ __forceinline__ RingTask next() const {
    mbarrier_wait(known(stage_), parity_);
    RingTask task;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(task.order.id), "=r"(task.target)
                 : "r"(id_of(stage_))
                 : "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(task.order.bytes), "=r"(task.order.in_flight)
                 : "r"(bytes(stage_))
                 : "memory");
    asm volatile("ld.shared.u64 %0, [%1];"
                 : "=l"(task.order.source)
                 : "r"(source(stage_))
                 : "memory");
    return task;
  }
  // Waits until one more copy may be under way, lets copies(StageCopies) start what brings the
  // bytes of `order` by copy_to_stage() or its like, and goes on to the next stage.
  template <typename Copies>
  __device__ __forceinline__ void copy(const RingOrder& order, Copies&& copies) {
    const std::uint32_t barrier = full(stage_);
    if constexpr (kBulkCopies) mbarrier_arrive_expect(barrier, order.bytes);
    wait_for_earlier(order.in_flight);
    if constexpr (!kBulkCopies) __syncwarp();  // lanes side by side make whole lines
    copies(StageCopies{barrier, policy_});
    if constexpr (!kBulkCopies) mbarrier_arrive_behind_copies(barrier);
    advance();
  }

 private:
  std::uint64_t policy_;
};

// A consumer's side, held by every thread of the consumer warps.
class RingConsumer : public RingCursor {
 public:
  using RingCursor::RingCursor;

  // What the current stage will hold; waits for its announcement, not for its data.
  __device__ __forceinline__ RingAnnouncement announcement() const {
    return announcement(stage_, parity_);
  }
  // Of the stage behind the current one.
  __device__ __forceinline__ RingAnnouncement next_announcement() const {
    return announcement(next_stage(), next_parity());
  }
  // Waits until the current stage, or the one behind it, has landed.
  __device__ __forceinline__ void wait_landed() const { mbarrier_wait(full(stage_), parity_); }
  __device__ __forceinline__ void wait_next_landed() const {
    mbarrier_wait(full(next_stage()), next_parity());
  }
  // The data of the current stage, which has landed: an address in shared memory.
  __device__ __forceinline__ std::uint32_t data() const { return what(stage_).data; }
  // Looks at the current stage, or at the one behind it, without waiting for anything.
  __device__ __forceinline__ RingPeek peek() const { return peek(stage_, parity_); }
  __device__ __forceinline__ RingPeek peek_next() const {
    return peek(next_stage(), next_parity());
  }
  // This warp is done with the stage, or with it and the next one.
  __device__ __forceinline__ void release(int lane, bool two = false) {
    __syncwarp();
    const bool arrives = kEveryLaneArrives || lane == 0;
    if (arrives) mbarrier_arrive(empty(stage_));
    advance();
    if (!two) return;
    if (arrives) mbarrier_arrive(empty(stage_));
    advance();
  }

 private:
  __device__ __forceinline__ std::uint32_t next_stage() const {
    return stage_ + kStep == end_ ? begin_ : stage_ + kStep;
  }
  __device__ __forceinline__ std::uint32_t next_parity() const {
    return stage_ + kStep == end_ ? parity_ ^ 1 : parity_;
  }
  __device__ __forceinline__ static RingAnnouncement announcement(std::uint32_t stage,
                                                                  std::uint32_t parity) {
    mbarrier_wait(known(stage), parity);
    return what(stage);
  }
  __device__ __forceinline__ static RingPeek peek(std::uint32_t stage, std::uint32_t parity) {
    const bool landed = mbarrier_test(full(stage), parity);
    // Where it has not landed, the scheduler may be writing what is read here, and nobody looks at
    // it.
    if (kEveryLaneArrives && !landed) return {};
    return {landed, what(stage)};
  }
  // Of a stage whose announcement this thread has seen, or whose data it has seen landed.
  __device__ __forceinline__ static RingAnnouncement what(std::uint32_t stage) {
    RingAnnouncement what;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(what.label.first), "=r"(what.label.second), "=r"(what.id), "=r"(what.data)
                 : "r"(announced(stage))
                 : "memory");
    return what;
  }
};

}  // namespace clusterfusion::device
