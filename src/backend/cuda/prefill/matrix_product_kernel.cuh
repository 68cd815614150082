// The kernel behind matrix_product.hpp.
//
// A block computes tiles of the result, one after the other. A thread, the producer, brings steps
// of 64 elements of a tile's rows of x and of the weights into a ring in shared memory, and runs
// ahead into the next tile; a warpgroup does so where there are no bulk copies. A warpgroup
// multiplies a whole tile, 64 rows at a time, and writes what comes out through a little shared
// memory of each warp's own, so that rows go to global memory in whole sectors; where there are
// two, they take tiles in turns, and one writes while the other multiplies. Blocks of a cluster
// have the same rows and neighbouring columns: each brings its share of the rows for all.
//
// Where warps multiply by themselves (mma.sync), a block is alone in its cluster. They read stages
// by ldmatrix, and an arrival at a barrier of the cluster is suspected to overtake that, even at
// the block's own: they arrive by its plain address (docs/prefill.md has what was seen).
#pragma once

#include <cuda.h>

#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/prefill/matrix_product.hpp"
#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/cluster.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/registers.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/ptx/tensor_copy.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sync/ring_place.cuh"

namespace clusterfusion::cuda::products {

using namespace device;

inline constexpr int kPartRows = 64;  // that a warpgroup multiplies at a time
inline constexpr int kGroupThreads = 128;
inline constexpr int kStepColumns = 64;              // of x and the weights
inline constexpr int kRowBytes = kStepColumns * 2;   // of a step
inline constexpr int kProducts = kStepColumns / 16;  // of a step, each of 16 elements
inline constexpr int kMaxStages = 24;
inline constexpr int kRingAlignment = 1024;
// Row tiles whose column tiles are computed together, so that the cache serves both.
inline constexpr int kRasterRows = 16;

// Of a warp, for its 16 rows: a strip of so many columns, in rows that begin 8 banks apart.
inline constexpr int kStripColumns = 32;
inline constexpr int kStripRow = (kStripColumns + 8) * 4;
inline constexpr int kStripBytes = 16 * kStripRow;

template <int kTheParts, int kTheColumns, int kTheGroups, int kTheCluster = 2>
struct TileShape {
  static constexpr int kParts = kTheParts;  // of 64 rows, in a tile
  static constexpr int kColumns = kTheColumns;
  static constexpr int kGroups = kTheGroups;    // warpgroups that multiply
  static constexpr int kCluster = kTheCluster;  // blocks
  static constexpr int kRows = kParts * kPartRows;
  static constexpr int kStripsBytes = kGroups * 4 * kStripBytes;
  // Two groups' sums need more registers than a launch gives to all: then the producer is a
  // warpgroup, which gives up some.
  static constexpr bool kMovesRegisters = kGroups == 2;
  static constexpr int kThreads = kGroups * kGroupThreads + (kMovesRegisters ? kGroupThreads : 32);
  // Without bulk copies: a whole warpgroup copies.
  static constexpr int kMostThreads = (kGroups + 1) * kGroupThreads;
};

struct ProductParams {
  CUtensorMap x, weight;  // in boxes of a block's share of the rows, and of a tile's columns
  const float* bias;
  const float* gate;
  void* y;
  int rows, out, steps;
  int row_tiles, column_tiles;  // of a cluster
  // Of a tile, rows that a block brings. Where there are fewer rows than a tile has, the others are
  // not brought: what lies in their place reaches no row but theirs.
  int share_rows;
  int input_bytes, stage_bytes;  // of a stage: all rows; with the weights
  int stages;
  ProductEpilogue epilogue;
  Activation activation;
  // What the maps are of, for devices without: [rows, in] and [out, in].
  const void* x_rows;
  const void* weight_rows;
  int in;
};

struct Ring {
  std::uint64_t full[kMaxStages], empty[kMaxStages];
  std::uint64_t turn[2];  // of a group: the other one has seen all its steps
};

struct TilePlace {
  int row, column;  // the first of each
};

// The tiles of a block, in their order.
template <typename Shape>
class Tiles {
 public:
  __device__ __forceinline__ explicit Tiles(const ProductParams& params)
      : p(params), tile_(blockIdx.x / Shape::kCluster) {}
  __device__ __forceinline__ bool is_over() const { return tile_ >= p.row_tiles * p.column_tiles; }
  __device__ __forceinline__ void advance() { tile_ += gridDim.x / Shape::kCluster; }
  __device__ __forceinline__ TilePlace place() const {
    const int per_band = kRasterRows * p.column_tiles;
    const int band = tile_ / per_band;
    const int rows = min(kRasterRows, p.row_tiles - band * kRasterRows);
    const int in_band = tile_ - band * per_band;
    const int column = in_band / rows * Shape::kCluster + blockIdx.x % Shape::kCluster;
    return {(band * kRasterRows + in_band % rows) * Shape::kRows, column * Shape::kColumns};
  }

 private:
  const ProductParams& p;
  int tile_;
};

// For one thread.
template <typename Shape>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ProductParams& params, std::uint32_t stages, Ring& ring)
      : p(params),
        stages_(stages),
        full_(shared_address(ring.full)),
        empty_(shared_address(ring.empty)) {}

  __device__ __forceinline__ void run() const {
    Tiles<Shape> tiles(p);
    // The weights of the first stages come before what the kernels in front of this one write.
    const int ahead = min(p.stages, p.steps);
    for (int step = 0; step < ahead; ++step) {
      mbarrier_arrive_expect(full_ + 8 * step, p.stage_bytes);
      copy_weights(step, tiles.place(), step);
    }
    wait_for_dependencies();
    for (int step = 0; step < ahead; ++step) copy_input(step, tiles.place(), step);
    RingPlace place;
    for (int step = 0; step < ahead; ++step) place.advance(p.stages);
    for (int step = ahead; !tiles.is_over(); tiles.advance(), step = 0) {
      const TilePlace at = tiles.place();
      for (; step < p.steps; ++step) {
        // Nobody has used a stage before its first round.
        mbarrier_wait(empty_ + 8 * place.stage, place.parity ^ 1);
        mbarrier_arrive_expect(full_ + 8 * place.stage, p.stage_bytes);
        copy_weights(place.stage, at, step);
        copy_input(place.stage, at, step);
        place.advance(p.stages);
      }
    }
  }

 private:
  __device__ __forceinline__ void copy_input(int stage, TilePlace at, int step) const {
    const std::uint32_t input = stages_ + stage * p.stage_bytes, full = full_ + 8 * stage;
    const int column = step * kStepColumns;
    if constexpr (Shape::kCluster > 1) {
      const auto share = static_cast<int>(cluster_rank());
      tensor_copy_to_blocks(input + share * p.share_rows * kRowBytes, p.x, column,
                            at.row + share * p.share_rows, full, (1 << Shape::kCluster) - 1);
    } else {
      tensor_copy_to_shared(input, p.x, column, at.row, full);
    }
  }
  __device__ __forceinline__ void copy_weights(int stage, TilePlace at, int step) const {
    tensor_copy_to_shared(stages_ + stage * p.stage_bytes + p.input_bytes, p.weight,
                          step * kStepColumns, at.column, full_ + 8 * stage);
  }

  const ProductParams& p;
  const std::uint32_t stages_, full_, empty_;
};

// The same without bulk copies: for a warpgroup, each thread of which copies 16 bytes at a time.
template <typename Shape>
class CopyingProducer {
 public:
  __device__ __forceinline__ CopyingProducer(const ProductParams& params, std::uint32_t stages,
                                             Ring& ring)
      : p(params),
        first_row_(static_cast<int>(threadIdx.x) % kGroupThreads / kRowUnits),
        unit_(static_cast<int>(threadIdx.x) % kRowUnits),
        stages_(stages),
        full_(shared_address(ring.full)),
        empty_(shared_address(ring.empty)) {}

  __device__ __forceinline__ void run() const {
    RingPlace place;
    for (Tiles<Shape> tiles(p); !tiles.is_over(); tiles.advance()) {
      const TilePlace at = tiles.place();
      for (int step = 0; step < p.steps; ++step) {
        // Nobody has used a stage before its first round.
        mbarrier_wait(empty_ + 8 * place.stage, place.parity ^ 1);
        const std::uint32_t stage = stages_ + place.stage * p.stage_bytes;
        copy(stage, p.input_bytes / kRowBytes, p.x_rows, at.row, p.rows, step);
        copy(stage + p.input_bytes, Shape::kColumns, p.weight_rows, at.column, p.out, step);
        mbarrier_arrive_behind_copies(full_ + 8 * place.stage);
        place.advance(p.stages);
      }
    }
  }

 private:
  static constexpr int kRowUnits = kRowBytes / 16;
  static constexpr int kRowsAtOnce = kGroupThreads / kRowUnits;
  static_assert(kRowsAtOnce % 8 == 0);  // so that a thread's units lie in one place of all its rows

  // `count` rows of a step as a swizzled box would have them, zeros where there is nothing.
  __device__ __forceinline__ void copy(std::uint32_t target, int count, const void* matrix, int row,
                                       int rows, int step) const {
    const int column = step * kStepColumns + unit_ * 8;
    const auto* source = static_cast<const char*>(matrix) +
                         (static_cast<std::int64_t>(row + first_row_) * p.in + column) * 2;
    const std::int64_t stride = std::int64_t{kRowsAtOnce} * p.in * 2;
    target += first_row_ * kRowBytes + (unit_ ^ (first_row_ & 7)) * 16;
    for (int i = first_row_; i < count; i += kRowsAtOnce) {
      copy_16_or_zero(target, source, row + i < rows && column < p.in);
      source += stride;
      target += kRowsAtOnce * kRowBytes;
    }
  }

  const ProductParams& p;
  const int first_row_, unit_;
  const std::uint32_t stages_, full_, empty_;
};

// What becomes of results, with bias.
template <typename T>
class Finisher {
 public:
  __device__ __forceinline__ explicit Finisher(const ProductParams& params) : p(params) {}

  // kCount times four neighbours of a row, from element `index` of y on; those that are not valid
  // lie outside of y.
  template <int kCount>
  __device__ __forceinline__ void finish(const float4 (&value)[kCount],
                                         const std::int64_t (&index)[kCount],
                                         const bool (&valid)[kCount], int column) const {
    switch (p.epilogue) {
      case ProductEpilogue::store:
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (valid[i]) store(index[i], value[i], column);
        return;
      case ProductEpilogue::add: {
        float4 before[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (valid[i]) before[i] = *wide(index[i]);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (valid[i])
            *wide(index[i]) = make_float4(before[i].x + value[i].x, before[i].y + value[i].y,
                                          before[i].z + value[i].z, before[i].w + value[i].w);
        return;
      }
      case ProductEpilogue::activate:
        return with_activation([&](auto activate) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const float4 result = activate(value[i]);
            if (valid[i]) store_narrow(index[i], result);
          }
        });
      case ProductEpilogue::times_gate: {
        float4 gate[kCount] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (valid[i]) gate[i] = *reinterpret_cast<const float4*>(p.gate + index[i]);
        return with_activation([&](auto activate) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const float4 a = activate(gate[i]);
            if (valid[i])
              store_narrow(index[i], make_float4(a.x * value[i].x, a.y * value[i].y,
                                                 a.z * value[i].z, a.w * value[i].w));
          }
        });
      }
    }
  }

 private:
  __device__ __forceinline__ float4* wide(std::int64_t index) const {
    return reinterpret_cast<float4*>(static_cast<float*>(p.y) + index);
  }
  // Rows of any length, whose beginnings may lie anywhere.
  __device__ __forceinline__ void store(std::int64_t index, float4 value, int column) const {
    if (p.out % 4 == 0) {
      *wide(index) = value;
      return;
    }
    const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < p.out) static_cast<float*>(p.y)[index + i] = values[i];
  }
  __device__ __forceinline__ void store_narrow(std::int64_t index, float4 value) const {
    *reinterpret_cast<uint2*>(static_cast<char*>(p.y) + index * 2) =
        make_uint2(pack<T>(value.x, value.y), pack<T>(value.z, value.w));
  }

  template <Activation kActivation>
  struct Activate {
    __device__ __forceinline__ float4 operator()(float4 v) const {
      return make_float4(activate(kActivation, v.x), activate(kActivation, v.y),
                         activate(kActivation, v.z), activate(kActivation, v.w));
    }
  };
  // Calls function(activate) for the activation, which is asked for but once.
  template <typename Function>
  __device__ __forceinline__ void with_activation(const Function& function) const {
    switch (p.activation) {
      case Activation::gelu_erf: return function(Activate<Activation::gelu_erf>{});
      case Activation::gelu_tanh: return function(Activate<Activation::gelu_tanh>{});
      case Activation::gelu_quick: return function(Activate<Activation::gelu_quick>{});
      case Activation::relu: return function(Activate<Activation::relu>{});
      case Activation::relu_squared: return function(Activate<Activation::relu_squared>{});
      case Activation::silu: return function(Activate<Activation::silu>{});
      case Activation::mish: return function(Activate<Activation::mish>{});
      case Activation::tanh: return function(Activate<Activation::tanh>{});
      case Activation::sigmoid: return function(Activate<Activation::sigmoid>{});
      case Activation::identity: return function(Activate<Activation::identity>{});
    }
  }

  const ProductParams& p;
};

// For a warpgroup. Its sums are as wgmma.cuh says.
template <typename T, typename Shape, ProductUnit kUnit>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const ProductParams& params, std::uint32_t stages,
                                      std::uint32_t strips, Ring& ring)
      : p(params),
        group_(threadIdx.x / kGroupThreads),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32),
        stages_(stages),
        strip_(strips + threadIdx.x / 32 * kStripBytes),
        full_(shared_address(ring.full)),
        empty_(Shape::kCluster > 1
                   ? address_in_block(shared_address(ring.empty), lane_ % Shape::kCluster)
                   : shared_address(ring.empty)),
        turn_(shared_address(ring.turn)) {}

  __device__ __forceinline__ void run() {
    wait_for_dependencies();
    RingPlace place;
    int turn = 0;
    std::uint32_t turn_parity = 0;
    bool is_first = true;  // of all tiles
    for (Tiles<Shape> tiles(p); !tiles.is_over(); tiles.advance(), turn ^= 1, is_first = false) {
      if (Shape::kGroups == 2 && turn != group_) {
        place.skip(p.steps, p.stages);
        continue;
      }
      // Waits by parity need to know that the rounds before are over (mbarrier.cuh).
      if (Shape::kGroups == 2 && !is_first) {
        mbarrier_wait(turn_ + 8 * group_, turn_parity);
        turn_parity ^= 1;
      }
      multiply(place);
      write(tiles.place());
    }
  }

 private:
  static constexpr int kPartSums = Shape::kColumns / 2;

  __device__ __forceinline__ void multiply(RingPlace& place) {
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part)
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sum_[part][i] = 0.0f;
    if constexpr (kUnit == ProductUnit::warpgroup)
      multiply_in_group(place);
    else
      multiply_in_warp(place);
  }

  // The step's products begin when it has arrived, and its stage is free when they have ended.
  __device__ __forceinline__ void multiply_in_group(RingPlace& place) {
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      wait_for_step(step, place);
      start_step(place.stage);
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = place.stage;
      place.advance(p.stages);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) wgmma_results(sum_[part]);
    release(previous);
  }

  // The operands of sixteen elements come from shared memory while those before are multiplied. A
  // step's stage is free when the next step has arrived: by then its products have begun, and so
  // all reads of it have ended.
  __device__ __forceinline__ void multiply_in_warp(RingPlace& place) {
    Fragments fragments[2];
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      const int stage = place.stage;
      wait_for_step(step, place);
      __syncwarp();
      if (previous >= 0) release(previous);
      fragments[0].load(*this, stage, 0);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        if (i + 1 < kProducts) fragments[(i + 1) % 2].load(*this, stage, i + 1);
        multiply(fragments[i % 2]);
      }
      previous = stage;
      place.advance(p.stages);
    }
    __syncwarp();
    release(previous);
  }

  __device__ __forceinline__ void wait_for_step(int step, const RingPlace& place) const {
    mbarrier_wait(full_ + 8 * place.stage, place.parity);
    if (step + 1 == p.steps) hand_over();
  }

  // All steps have arrived: the other group may wait for its own.
  __device__ __forceinline__ void hand_over() const {
    if constexpr (Shape::kGroups == 2)
      if (threadIdx.x % kGroupThreads == 0) mbarrier_arrive(turn_ + 8 * (1 - group_));
  }

  __device__ __forceinline__ void start_step(int stage) {
    const std::uint64_t input = wgmma_swizzled_operand(input_of(stage));
    const std::uint64_t weights = wgmma_swizzled_operand(weights_of(stage));
    constexpr int kPartBytes = kPartRows * kRowBytes;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part)
        wgmma_64x16<T, Shape::kColumns>(sum_[part],
                                        input + part * (kPartBytes >> 4) + i * kWgmmaStep,
                                        weights + i * kWgmmaStep);
    wgmma_commit();
  }

  // To all blocks that bring something into the stage.
  __device__ __forceinline__ void release(int stage) const {
    if constexpr (Shape::kCluster > 1) {
      if (lane_ < Shape::kCluster) mbarrier_arrive_in_cluster(empty_ + 8 * stage);
    } else if (lane_ == 0) {
      mbarrier_arrive(empty_ + 8 * stage);
    }
  }
  __device__ __forceinline__ std::uint32_t input_of(int stage) const {
    return stages_ + stage * p.stage_bytes;
  }
  __device__ __forceinline__ std::uint32_t weights_of(int stage) const {
    return stages_ + stage * p.stage_bytes + p.input_bytes;
  }

  // Address of 16 bytes of a row, as the copies have laid them.
  __device__ __forceinline__ static std::uint32_t unit_address(std::uint32_t rows, int row,
                                                               int unit) {
    return rows + row * kRowBytes + (unit ^ (row & 7)) * 16;
  }

  // This warp's operands of sixteen elements, as mma.cuh has them.
  struct Fragments {
    uint4 input[Shape::kParts];
    uint4 weights[Shape::kColumns / 16];

    __device__ __forceinline__ void load(const Consumer& c, int stage, int i) {
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part)
        input[part] = load_matrix_4(unit_address(c.input_of(stage),
                                                 part * kPartRows + 16 * c.warp_ + c.lane_ % 16,
                                                 2 * i + c.lane_ / 16));
        // Columns 0 to 7 at both halves of the 16 elements, then columns 8 to 15.
#pragma unroll
      for (int column = 0; column < Shape::kColumns; column += 16)
        weights[column / 16] = load_matrix_4(unit_address(
            c.weights_of(stage), column + c.lane_ / 16 * 8 + c.lane_ % 8, 2 * i + c.lane_ / 8 % 2));
    }
  };

  __device__ __forceinline__ void multiply(const Fragments& fragments) {
#pragma unroll
    for (int column = 0; column < Shape::kColumns; column += 16) {
      const uint4& weights = fragments.weights[column / 16];
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        float* const sum = &sum_[part][column / 2];
        mma_16x8x16<T>(*reinterpret_cast<float(*)[4]>(sum), fragments.input[part], weights.x,
                       weights.y);
        mma_16x8x16<T>(*reinterpret_cast<float(*)[4]>(sum + 4), fragments.input[part], weights.z,
                       weights.w);
      }
    }
  }

  __device__ __forceinline__ void write(TilePlace at) {
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part)
      write_part(sum_[part], at.row + part * kPartRows + warp_ * 16, at.column);
  }

  // A loop, so that what becomes of a strip is there once: the sums move up to where it looks.
  __device__ __forceinline__ void write_part(float (&sum)[kPartSums], int row, int first_column) {
    if (row >= p.rows) return;
#pragma unroll 1
    for (int column = first_column; column < min(first_column + Shape::kColumns, p.out);
         column += kStripColumns) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kStripColumns / 8; ++j) {
        const std::uint32_t to = strip_ + lane_ / 4 * kStripRow + (8 * j + lane_ % 4 * 2) * 4;
        store_shared_2(to, sum[4 * j], sum[4 * j + 1]);
        store_shared_2(to + 8 * kStripRow, sum[4 * j + 2], sum[4 * j + 3]);
      }
#pragma unroll
      for (int i = 0; i + kStripColumns / 2 < kPartSums; ++i) sum[i] = sum[i + kStripColumns / 2];
      __syncwarp();
      write_strip(row, column);
    }
  }

  // Eight lanes a row, four columns each.
  __device__ __forceinline__ void write_strip(int first_row, int first_column) const {
    constexpr int kRounds = 4;
    const int column = first_column + lane_ % 8 * 4;
    float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p.bias != nullptr && column < p.out)
      bias = __ldg(reinterpret_cast<const float4*>(p.bias + column));
    float4 value[kRounds];
    std::int64_t index[kRounds];
    bool valid[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = 4 * i + lane_ / 8;
      value[i] = load_shared_float_4(strip_ + row * kStripRow + lane_ % 8 * 16);
      value[i].x += bias.x;
      value[i].y += bias.y;
      value[i].z += bias.z;
      value[i].w += bias.w;
      index[i] = static_cast<std::int64_t>(first_row + row) * p.out + column;
      valid[i] = first_row + row < p.rows && column < p.out;
    }
    Finisher<T>(p).finish(value, index, valid, column);
  }

  const ProductParams& p;
  const int group_, warp_, lane_;
  const std::uint32_t stages_, strip_, full_;
  const std::uint32_t empty_;  // of the block of the cluster that this lane tells
  const std::uint32_t turn_;
  float sum_[Shape::kParts][kPartSums];
};

template <typename Shape>
__device__ __forceinline__ void prepare_ring(Ring& ring, int stages) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(&ring.full[stage], kBulkCopies ? 1 : kGroupThreads);
      mbarrier_init(&ring.empty[stage], 4 * Shape::kCluster);
    }
    for (std::uint64_t& turn : ring.turn) mbarrier_init(&turn, 1);
    mbarrier_fence_init();
  }
  cluster_barrier();
}

template <typename T, typename Shape, ProductUnit kUnit>
__global__ void __launch_bounds__(kBulkCopies ? Shape::kThreads : Shape::kMostThreads,
                                  Shape::kGroups == 2 || Shape::kColumns >= 128 ? 1 : 2)
    multiply(const __grid_constant__ ProductParams p) {
  static_assert(kUnit == ProductUnit::warpgroup || Shape::kCluster == 1);
  if constexpr (kWarpgroups || kUnit == ProductUnit::warp) {
    start_dependents();
    extern __shared__ char shared[];
    __shared__ Ring ring;
    const std::uint32_t stages =
        (shared_address(shared) + kRingAlignment - 1) / kRingAlignment * kRingAlignment;
    prepare_ring<Shape>(ring, p.stages);
    if (threadIdx.x >= Shape::kGroups * kGroupThreads) {
      if constexpr (Shape::kMovesRegisters) give_up_registers<40>();
      if constexpr (!kBulkCopies)
        CopyingProducer<Shape>(p, stages, ring).run();
      else if (threadIdx.x < Shape::kGroups * kGroupThreads + 32 && elect_one())
        Producer<Shape>(p, stages, ring).run();
    } else {
      if constexpr (Shape::kMovesRegisters) take_registers<232>();
      Consumer<T, Shape, kUnit>(p, stages, stages + p.stages * p.stage_bytes, ring).run();
    }
    // Others of the cluster may still bring something, or arrive.
    cluster_barrier();
  }
}

}  // namespace clusterfusion::cuda::products
