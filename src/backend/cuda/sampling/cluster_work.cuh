// What the blocks of the sampling cluster do together: reduce values, and select by key. All of it
// gives every thread of every block the same result, in whatever order the threads ran.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ptx/cluster.cuh"

namespace clusterfusion::cuda {

using device::cluster_barrier;
using device::cluster_rank;
using device::kAllLanes;
using device::of_block;

// The largest cluster that every device with clusters allows; on others a block does all.
inline constexpr int kClusterBlocks = 8;
inline constexpr int kSampleBlocks = device::kBulkCopies ? kClusterBlocks : 1;
inline constexpr int kSampleThreads = 1024;
inline constexpr int kSampleWarps = kSampleThreads / 32;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& value, int offset) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0);
  std::uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], offset);
  T other;
  std::memcpy(&other, words, sizeof(T));
  return other;
}

// Over aligned groups of kWidth lanes. combine(a, b) must be combine(b, a).
template <int kWidth, typename T, typename Combine>
__device__ __forceinline__ T combine_lanes(T value, Combine combine) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    value = combine(value, shuffle_xor(value, offset));
  return value;
}

template <typename T>
struct ReduceMemory {
  T warps[kSampleWarps];
  T block;
};

// All threads' values in one. Each `memory` may be used once a launch.
template <typename T, typename Combine>
__device__ T combine_cluster(ReduceMemory<T>& memory, T value, Combine combine) {
  value = combine_lanes<32>(value, combine);
  if (lane_index() == 0) memory.warps[warp_index()] = value;
  __syncthreads();
  if (warp_index() == 0) {
    static_assert(kSampleWarps == 32);
    value = combine_lanes<32>(memory.warps[lane_index()], combine);
    if (lane_index() == 0) memory.block = value;
  }
  cluster_barrier();
  value = *of_block(&memory.block, static_cast<std::uint32_t>(lane_index() % kSampleBlocks));
  return combine_lanes<kSampleBlocks>(value, combine);
}

template <typename T>
__device__ __forceinline__ T sum_to_lane(T value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_index() >= offset) value += other;
  }
  return value;
}

// ---------------------------------------------------------------- selection

inline constexpr int kDigitBits = 8;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kPlaces = 32 / kDigitBits;
// Of each digit's sum, so that the lanes of a warp seldom add to the same one.
inline constexpr int kCopies = 8;

struct SelectMemory {
  // Sums by digit, as two words each: shared memory has no addition of 64 bits. Zero between uses.
  alignas(16) std::uint32_t low[kDigits * kCopies];
  alignas(16) std::uint32_t high[kDigits * kCopies];
  // This block's sums. Two sets take turns: a block may add up the next digit's while another still
  // reads these.
  std::uint64_t sums[2][kDigits];
  std::uint64_t warp_sums[kDigits / 32];
  std::uint64_t before, at;
  std::uint32_t digit;
};

__device__ __forceinline__ void init_select(SelectMemory& memory) {
  for (int i = static_cast<int>(threadIdx.x); i < kDigits * kCopies; i += kSampleThreads)
    memory.low[i] = memory.high[i] = 0;
}

__device__ __forceinline__ void add_weight(SelectMemory& memory, std::uint32_t digit,
                                           std::uint64_t weight) {
  const std::uint32_t slot = digit * kCopies + threadIdx.x % kCopies;
  const auto low = static_cast<std::uint32_t>(weight);
  const std::uint32_t old = atomicAdd(&memory.low[slot], low);
  const std::uint32_t carry = old + low < old ? 1 : 0;
  const std::uint32_t high = static_cast<std::uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&memory.high[slot], high);
}

// Sum of one digit in this block; leaves zeros behind.
__device__ __forceinline__ std::uint64_t take_sum(SelectMemory& memory, int digit) {
  std::uint64_t low = 0, high = 0;
#pragma unroll
  for (int copy = 0; copy < kCopies; copy += 4) {
    auto* l = reinterpret_cast<uint4*>(&memory.low[digit * kCopies + copy]);
    auto* h = reinterpret_cast<uint4*>(&memory.high[digit * kCopies + copy]);
    low += (std::uint64_t{l->x} + l->y) + (std::uint64_t{l->z} + l->w);
    high += (std::uint64_t{h->x} + h->y) + (std::uint64_t{h->z} + h->w);
    *l = *h = make_uint4(0, 0, 0, 0);
  }
  return low + (high << 32);
}

// Where tokens in the order of their keys, the smallest first, reach a sum of weights.
struct Selection {
  std::uint32_t key;
  bool complete;         // takes all tokens with keys up to `key`; if not, those with smaller keys
                         // and some of those with this one
  std::uint64_t before;  // if not complete: weight of all tokens with smaller keys
  std::uint64_t at;      // and of all tokens with this one
  std::uint64_t total;   // of all tokens
};

// for_each_key(f) calls f(key) for each of this thread's tokens. weight_of(key) is a token's
// weight; tokens with keys up to this one weigh at least least_weight(key). reached(sum, total) is
// false for 0, true for the total, and never becomes false again. `turn` is 0 at first, and left to
// the next call.
//
// Digit by digit, the highest first: sums of weights by the digit, in all blocks, and the digit at
// which it is reached. Integers all, so the order of additions does not matter. It ends early where
// all tokens that share the digits so far are needed.
template <typename ForEachKey, typename WeightOf, typename LeastWeight, typename Reached>
__device__ Selection select(SelectMemory& memory, int& turn, ForEachKey for_each_key,
                            WeightOf weight_of, LeastWeight least_weight, Reached reached) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = warp_index();
  Selection found{};
#pragma unroll 1
  for (int place = kPlaces - 1; place >= 0; --place) {
    const bool first = place == kPlaces - 1;
    const int shift = place * kDigitBits;
    std::uint64_t* own_sums = memory.sums[turn];
    turn ^= 1;
    for_each_key([&](std::uint32_t key) {
      if (!first && key >> (shift + kDigitBits) != found.key) return;
      const std::uint64_t weight = weight_of(key);
      if (weight != 0) add_weight(memory, (key >> shift) & (kDigits - 1), weight);
    });
    __syncthreads();
    if (thread < kDigits) own_sums[thread] = take_sum(memory, thread);
    cluster_barrier();
    std::uint64_t sum = 0, up_to = 0;
    if (thread < kDigits) {
#pragma unroll
      for (std::uint32_t block = 0; block < kSampleBlocks; ++block)
        sum += *of_block(own_sums + thread, block);
      up_to = sum_to_lane(sum);
      if (lane_index() == 31) memory.warp_sums[warp] = up_to;
    }
    __syncthreads();
    if (first)
      for (const std::uint64_t part : memory.warp_sums) found.total += part;
    if (thread < kDigits) {
      up_to += found.before;
      for (int w = 0; w < warp; ++w) up_to += memory.warp_sums[w];
      if (reached(up_to, found.total) && !reached(up_to - sum, found.total)) {
        memory.digit = static_cast<std::uint32_t>(thread);
        memory.before = up_to - sum;
        memory.at = sum;
      }
    }
    __syncthreads();
    found.key = found.key << kDigitBits | memory.digit;
    found.before = memory.before;
    found.at = memory.at;
    // With these digits; if without the least of their tokens it is not reached, all are needed.
    const std::uint32_t largest = found.key << shift | ((1u << shift) - 1);
    found.complete = !reached(found.before + found.at - least_weight(largest), found.total);
    if (found.complete) {
      found.key = largest;
      break;
    }
  }
  return found;
}

// ---------------------------------------------------------------- ties

struct TieMemory {
  std::uint32_t count;  // in this block
  std::uint32_t warps[kSampleWarps];
  std::int32_t token;
};

// Sum over the threads of this block up to this one; `total` gets all of it.
__device__ __forceinline__ std::uint32_t sum_to_thread(TieMemory& memory, std::uint32_t value,
                                                       std::uint32_t& total) {
  __syncthreads();  // for who still reads the last result
  std::uint32_t sum = sum_to_lane(value);
  if (lane_index() == 31) memory.warps[warp_index()] = sum;
  __syncthreads();
  total = 0;
#pragma unroll 1  // unrolled, its loads take registers that others need
  for (int w = 0; w < kSampleWarps; ++w) {
    if (w < warp_index()) sum += memory.warps[w];
    total += memory.warps[w];
  }
  return sum;
}

// The id of the `wanted`-th (from 1) of the tokens that tied(token) holds for, by id; there are so
// many. Blocks hold groups of 4 tokens, [begin, end), in the order of their ranks.
template <typename Tied>
__device__ std::int32_t find_tied(TieMemory& memory, int begin, int end, std::uint32_t wanted,
                                  Tied tied) {
  const auto ties_of = [&](int group) {
    std::uint32_t count = 0;
    for (int i = 0; i < 4; ++i) count += tied(4 * group + i) ? 1 : 0;
    return count;
  };
  const int thread = static_cast<int>(threadIdx.x);
  std::uint32_t own = 0, total = 0;
  for (int group = begin + thread; group < end; group += kSampleThreads) own += ties_of(group);
  sum_to_thread(memory, own, total);
  if (thread == 0) memory.count = total;
  cluster_barrier();

  std::uint32_t owner = 0, before = 0;  // the block that has it, and how many lie in earlier blocks
  for (;; ++owner) {
    const std::uint32_t count = *of_block(&memory.count, owner);
    if (before + count >= wanted || owner + 1 == kSampleBlocks) break;
    before += count;
  }
  if (owner == cluster_rank()) {
    for (int first = begin; first < end; first += kSampleThreads) {
      const int group = first + thread;
      own = group < end ? ties_of(group) : 0;
      const std::uint32_t up_to = before + sum_to_thread(memory, own, total);
      if (up_to - own < wanted && wanted <= up_to) {
        int token = 4 * group;
        for (std::uint32_t left = wanted - (up_to - own);; ++token)
          if (tied(token) && --left == 0) break;
        memory.token = token;
      }
      before += total;
    }
  }
  cluster_barrier();
  return *of_block(&memory.token, owner);
}

}  // namespace clusterfusion::cuda
