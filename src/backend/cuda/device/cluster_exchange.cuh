// Sums and gathers over a thread-block cluster, through distributed shared memory (sm_90 and
// later).
//
//   cluster_reduce  every block has a vector; then every block has their combination, made in the
//                   order of ranks: v[0] op v[1] op ... op v[size - 1], the same bits in every
//                   block and in every run, and no atomics
//   cluster_gather  every block has a piece; then every block has all pieces, in order of rank
//
// Both push: a thread sends its words from registers into the shared memory of the other blocks
// (st.async), where each store tells a barrier how many bytes have come. So data crosses once, in
// one direction, the receiver waits on its own shared memory, and the sender may overwrite what it
// has sent. PTX ISA, "Data Movement and Conversion Instructions: st.async", "mapa"; "Parallel
// Synchronization and Communication Instructions: mbarrier", "barrier.cluster".
//
// Exchanges are numbered. Exchange e goes to half e % 2 of a buffer and to barrier e % 2, and
// nobody asks whether a half may be overwritten: who sends in exchange e + 2 has received from
// every block in exchange e + 1, and a block sends there when its threads have read what exchange e
// brought. That is why in every exchange every block sends something to every other, and why a
// block may exit when its last call has returned: all that is sent to it has come.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cuda/device/cluster.cuh"
#include "backend/cuda/device/mbarrier.cuh"

namespace clusterfusion::device {

// Where `address`, in this block's shared memory, lies in that of the block with `rank`: an address
// in the window of shared memory that a cluster has.
__device__ __forceinline__ std::uint32_t peer_address(std::uint32_t address, int rank) {
  std::uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// Stores into another block's shared memory, and tells a barrier there how many bytes came. Both
// are peer addresses.
__device__ __forceinline__ void send_to_peer(std::uint32_t target, uint4 words,
                                             std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(target),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send_to_peer(std::uint32_t target, std::uint32_t word,
                                             std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target),
      "r"(word), "r"(barrier)
      : "memory");
}

// As mbarrier_wait(), for what other blocks of the cluster have sent.
__device__ __forceinline__ void mbarrier_wait_cluster(std::uint32_t address, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}

// Lies in shared memory, at the same address in every block of the cluster.
struct ClusterControl {
  std::uint64_t arrived[2];
};

// Up to how many bytes a vector goes to everybody at once: one trip, size - 1 times the vector.
// Longer ones go in slices, each to the block that combines it, and back: two trips, less than
// twice the vector. A trip is taken to cost as much as sending 8 KB.
template <int kSize>
constexpr int cluster_reduce_directly_limit() {
  constexpr int kTripBytes = 8192;
  if constexpr (kSize <= 2)
    return 1 << 30;
  else
    return kTripBytes * kSize / ((kSize - 1) * (kSize - 2));
}

// Bytes of buffer that the exchanges of a cluster need for vectors, or pieces, of at most `bytes`.
template <int kSize>
constexpr int cluster_reduce_directly_bytes(int bytes) {
  return 2 * kSize * ((bytes + 15) / 16 * 16);
}
template <int kSize>
constexpr int cluster_reduce_in_slices_bytes(int bytes) {
  return 2 * kSize * (((bytes + 15) / 16 + kSize - 1) / kSize * 16);
}
template <int kSize>
constexpr int cluster_reduce_bytes(int bytes) {
  constexpr int kLimit = cluster_reduce_directly_limit<kSize>();
  // The longest vector that goes at once may need more than a longer one in slices.
  const int directly = cluster_reduce_directly_bytes<kSize>(bytes < kLimit ? bytes : kLimit);
  const int in_slices = cluster_reduce_in_slices_bytes<kSize>(bytes);
  return directly > in_slices ? directly : in_slices;
}
template <int kSize>
constexpr int cluster_gather_bytes(int bytes) {
  return 2 * ((kSize * bytes + 15) / 16 * 16);
}

// One block's side of the exchanges of a cluster of kSize blocks, of one dimension; the same in all
// its threads.
//
// Everything is called by all threads of all blocks of the cluster, in the same order with the same
// sizes. Blocks have one dimension. Pointers are to shared memory, at the same address in every
// block, and multiples of 16.
template <int kSize>
class ClusterExchange {
 public:
  // `buffer_bytes` is a multiple of 32. Initialises; holds a cluster barrier.
  __device__ __forceinline__ ClusterExchange(ClusterControl* control, void* buffer,
                                             int buffer_bytes)
      : barriers_(shared_address(control->arrived)),
        buffer_(static_cast<char*>(buffer)),
        half_bytes_(buffer_bytes / 2),
        rank_(static_cast<int>(cluster_rank())) {
    if (threadIdx.x == 0) {
      mbarrier_init(&control->arrived[0], 1);
      mbarrier_init(&control->arrived[1], 1);
      mbarrier_fence_init();
    }
    cluster_barrier();
  }

  // The two ways of cluster_reduce(), on vectors of `words` times 16 bytes.
  template <typename T, typename Op>
  __device__ __forceinline__ void reduce_directly(uint4* values, int words, Op&& op) {
    begin((kSize - 1) * words * 16);
    for (int step = 1; step < kSize; ++step) {
      const int peer = (rank_ + step) % kSize;
      const std::uint32_t slot = peer_address(shared_address(half()) + rank_ * words * 16, peer);
      const std::uint32_t barrier = peer_address(this->barrier(), peer);
      for (int i = thread(); i < words; i += threads())
        send_to_peer(slot + i * 16, values[i], barrier);
    }
    const auto* slots = reinterpret_cast<const uint4*>(half());
    finish();
    for (int i = thread(); i < words; i += threads())
      values[i] = combined<T>(values[i], slots + i, words, op);
    __syncthreads();
  }

  // At least one word for each block.
  template <typename T, typename Op>
  __device__ __forceinline__ void reduce_in_slices(uint4* values, int words, Op&& op) {
    const auto slice_begin = [words](int rank) { return words * rank / kSize; };
    const int first = slice_begin(rank_), end = slice_begin(rank_ + 1);
    const int slot_words = (words + kSize - 1) / kSize;
    begin((kSize - 1) * (end - first) * 16);
    for (int step = 1; step < kSize; ++step) {
      const int peer = (rank_ + step) % kSize;
      const std::uint32_t slot =
          peer_address(shared_address(half()) + rank_ * slot_words * 16, peer);
      const std::uint32_t barrier = peer_address(this->barrier(), peer);
      const int peer_first = slice_begin(peer), peer_end = slice_begin(peer + 1);
      for (int i = peer_first + thread(); i < peer_end; i += threads())
        send_to_peer(slot + (i - peer_first) * 16, values[i], barrier);
    }
    const auto* slots = reinterpret_cast<const uint4*>(half());
    finish();
    // Into the others' vectors: this slice of theirs has been read, for it has come here.
    expect((words - (end - first)) * 16);
    for (int i = first + thread(); i < end; i += threads()) {
      const uint4 word = combined<T>(values[i], slots + (i - first), slot_words, op);
      values[i] = word;
      for (int step = 1; step < kSize; ++step) {
        const int peer = (rank_ + step) % kSize;
        send_to_peer(peer_address(shared_address(values + i), peer), word,
                     peer_address(this->barrier(), peer));
      }
    }
    finish();
    __syncthreads();
  }

  // cluster_gather(), on pieces of `words` times the size of Word.
  template <typename Word>
  __device__ __forceinline__ const char* gather(const Word* piece, int words) {
    constexpr int kWordBytes = static_cast<int>(sizeof(Word));
    const int bytes = words * kWordBytes;
    begin((kSize - 1) * bytes);
    char* all = half();
    for (int step = 1; step < kSize; ++step) {
      const int peer = (rank_ + step) % kSize;
      const std::uint32_t slot = peer_address(shared_address(all) + rank_ * bytes, peer);
      const std::uint32_t barrier = peer_address(this->barrier(), peer);
      for (int i = thread(); i < words; i += threads())
        send_to_peer(slot + i * kWordBytes, piece[i], barrier);
    }
    auto* own = reinterpret_cast<Word*>(all + rank_ * bytes);
    for (int i = thread(); i < words; i += threads()) own[i] = piece[i];
    finish();
    __syncthreads();
    return all;
  }

 private:
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int threads() { return static_cast<int>(blockDim.x); }

  __device__ __forceinline__ std::uint32_t barrier() const { return barriers_ + number_ % 2 * 8; }
  __device__ __forceinline__ char* half() const { return buffer_ + number_ % 2 * half_bytes_; }

  // All threads have written what will be sent, and read what the exchange before has brought.
  __device__ __forceinline__ void begin(int bytes_to_come) {
    __syncthreads();
    expect(bytes_to_come);
  }
  __device__ __forceinline__ void expect(int bytes_to_come) {
    if (threadIdx.x == 0)
      mbarrier_arrive_expect(barrier(), static_cast<std::uint32_t>(bytes_to_come));
  }
  __device__ __forceinline__ void finish() {
    mbarrier_wait_cluster(barrier(), number_ / 2 % 2);
    ++number_;
  }

  // This block's word and those in the others' slots, in order of rank.
  template <typename T, typename Op>
  __device__ __forceinline__ uint4 combined(uint4 own, const uint4* slots, int slot_words,
                                            Op&& op) const {
    static_assert(16 % sizeof(T) == 0 && sizeof(T) % 4 == 0);
    constexpr int kElements = 16 / sizeof(T);
    T total[kElements], next[kElements];
#pragma unroll
    for (int rank = 0; rank < kSize; ++rank) {
      const uint4 word = rank == rank_ ? own : slots[rank * slot_words];
      std::memcpy(rank == 0 ? total : next, &word, 16);
#pragma unroll
      for (int i = 0; i < kElements && rank > 0; ++i) total[i] = op(total[i], next[i]);
    }
    uint4 result;
    std::memcpy(&result, total, 16);
    return result;
  }

  std::uint32_t barriers_;
  char* buffer_;  // two halves
  int half_bytes_;
  int rank_;
  std::uint32_t number_ = 0;  // of the exchange
};

// Combines the `count` (at least 1) elements at `values` of all blocks, in place: element i becomes
// op(... op(op(v0[i], v1[i]), v2[i]) ...) in every block. T is of 4, 8 or 16 bytes and trivially
// copyable. What lies behind the elements up to a multiple of 16 bytes is combined too: it may hold
// anything, and is lost.
//
// `exchange` has cluster_reduce_bytes<kSize>() of buffer, in which `values` may not lie. Called by
// all threads of all blocks of the cluster; begins and ends with a block barrier, waits for the
// other blocks' elements once or twice between, and holds no cluster barrier.
template <int kSize, typename T, typename Op>
__device__ __forceinline__ void cluster_reduce(ClusterExchange<kSize>& exchange, T* values,
                                               int count, Op&& op) {
  const int bytes = count * static_cast<int>(sizeof(T));
  const int words = (bytes + 15) / 16;
  auto* vector = reinterpret_cast<uint4*>(values);
  if (words < kSize || bytes <= cluster_reduce_directly_limit<kSize>())
    exchange.template reduce_directly<T>(vector, words, op);
  else
    exchange.template reduce_in_slices<T>(vector, words, op);
}

// Gathers the `count` (at least 1) elements at `piece` of all blocks: returns [kSize, count] in
// this block's shared memory, piece after piece, valid until the next call of cluster_reduce() or
// cluster_gather(). A piece is a multiple of 4 bytes; multiples of 16 are sent faster.
//
// `exchange` has cluster_gather_bytes<kSize>() of buffer, in which `piece` may not lie. Called by
// all threads of all blocks of the cluster; begins and ends with a block barrier, waits for the
// other blocks' pieces once between, and holds no cluster barrier.
template <int kSize, typename T>
__device__ __forceinline__ const T* cluster_gather(ClusterExchange<kSize>& exchange, const T* piece,
                                                   int count) {
  const int bytes = count * static_cast<int>(sizeof(T));
  const char* all = bytes % 16 == 0
                        ? exchange.gather(reinterpret_cast<const uint4*>(piece), bytes / 16)
                        : exchange.gather(reinterpret_cast<const std::uint32_t*>(piece), bytes / 4);
  return reinterpret_cast<const T*>(all);
}

}  // namespace clusterfusion::device
