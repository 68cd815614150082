// What all parts of a consumer warp's work know: who they are, where they are, and what comes next
// in the ring.
#pragma once

#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

// The ring as consumers see it, with the data of the current stage by address.
class StreamRing : public RingConsumer {
 public:
  __device__ __forceinline__ StreamRing(StreamShared* control, const StreamParams& p, char* data)
      : RingConsumer(&control->ring, p.stages),
        data_(shared_address(data)),
        stage_bytes_(p.stage_bytes) {}

  // Where the current stage's data comes from.
  __device__ __forceinline__ std::uint64_t copied_from() const {
    std::uint64_t address;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(address) : "r"(source(stage_)) : "memory");
    return address;
  }
  __device__ __forceinline__ std::uint32_t data() const {
    return data_ + (stage_ - begin_) / kStep * stage_bytes_;
  }

 private:
  std::uint32_t data_, stage_bytes_;
};

struct Consumer {
  const StreamParams& p;
  StreamShared* control;
  char* scratch;
  int thread, warp, lane, g, q;
  StreamRing ring;
  RingAnnouncement next;  // of the stage that comes next
  int epoch = 0;

  __device__ __forceinline__ Consumer(const StreamParams& params, char* shared)
      : p(params),
        control(shared_control(shared)),
        scratch(shared_scratch(shared)),
        thread(static_cast<int>(threadIdx.x)),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4),
        ring(control, params, shared_ring(params, shared)) {}

  // Keeps the compiler from hoisting the address arithmetic of all phases out of the loop over
  // layers, where it would spill the results.
  __device__ __forceinline__ void make_indices_opaque() {
    asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(g), "+r"(q));
  }
  __device__ __forceinline__ void barrier() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory");
  }
  __device__ __forceinline__ void await_announcement() { next = ring.announcement(); }
  __device__ __forceinline__ bool is_next(int phase) const {
    return phase_id_of(next.id) == phase_id(epoch, phase);
  }

  // A Lamport buffer of this epoch.
  template <typename Element>
  __device__ __forceinline__ Element* lamport(std::int32_t offset) const {
    return lamport_of<Element>(p, epoch, offset);
  }

  // Element `index` of attention's output for a row.
  template <typename T>
  __device__ __forceinline__ T* attention_output(int row, int index) const {
    return lamport<T>(p.layout.attention) + input_place(p, row, index);
  }

  // To be called by all threads, behind a barrier, when this block has read all that it needs of
  // earlier epochs, and in front of another one: then set `epoch` is clear.
  __device__ __forceinline__ void begin_epoch() const {
    if (thread != 0) return;
    block_counter_store(&control->begun, epoch + 1);
    block_counter_wait(&control->cleared, epoch);
  }

  __device__ __forceinline__ void mark(StreamPoint point) const {
    if (p.timeline == nullptr || warp != 0 || lane != 0) return;
    std::uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    constexpr int kPoints = static_cast<int>(StreamPoint::count);
    p.timeline[(static_cast<std::int64_t>(blockIdx.x) * p.steps * epochs_per_step(p) + epoch) *
                   kPoints +
               static_cast<int>(point)] = now;
  }
};

}  // namespace clusterfusion::cuda::stream
