// Many rows times a layer's matrices, on tensor cores, with the partial sums of the streaming
// kernel in its order: a row has the same bits here and there, however many rows there are.
//
// A block multiplies up to 128 rows by a tile of chunks (8 rows of a matrix each). A thread, the
// producer, brings steps of 32 columns by bulk copies of boxes, inputs and weights alike, into
// stages of two steps. The steps come in the order of the streaming kernel's warps
// (plan::ProductCut): all that its warp 0 sums, then all of warp 1, and so on, each a chain of its
// own, filled up with zeros to whole stages. Warpgroups multiply: of a step, a lane loads the same
// 16 bytes of a weight row as in the streaming kernel, and the same four elements of each go into
// one product; that one's sums are wgmma's here and mma.sync's there, which are the same bits.
#include <algorithm>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/gemm/product_input.hpp"
#include "backend/cuda/gemm/product_kernel.hpp"
#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/registers.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/ptx/tensor_copy.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"
#include "backend/cuda/sync/ring_place.cuh"
#include "backend/cuda/with_type.cuh"

// Elsewhere than on Hopper the kernel is empty, and what it is made of is not used.
#pragma nv_diag_suppress 177

namespace clusterfusion::cuda {
namespace {

using namespace device;

constexpr int kStepBytes = plan::kStepColumns * 2;  // of one row
constexpr int kStageSteps = 2;
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupChunks = 8;     // that it multiplies

// What a block computes: so many rows, by so many warpgroups. With many rows the producer is a
// warpgroup too, which gives up the registers that consumers take.
template <int kTheRows, int kTheGroups, int kTheProducerRegisters, int kTheConsumerRegisters,
          int kTheSharedBytes = static_cast<int>(kProductSharedBytes)>
struct BlockShape {
  static constexpr int kRows = kTheRows, kGroups = kTheGroups;
  static constexpr int kConsumers = kGroups * 4;                    // warps
  static constexpr int kProducerRegisters = kTheProducerRegisters;  // of a thread
  static constexpr int kConsumerRegisters = kTheConsumerRegisters;  // as many: what a launch gives
  static constexpr bool kMovesRegisters = kConsumerRegisters > kProducerRegisters;
  static constexpr int kProducerThreads = kMovesRegisters ? kGroupThreads : 32;
  static constexpr int kThreads = kGroups * kGroupThreads + kProducerThreads;
  static constexpr int kSharedBytes = kTheSharedBytes;
  static constexpr int kMaxChunks = kGroups * kGroupChunks;
  static constexpr int kPieceBytes = kRows * 16;
  static constexpr int kInputBytes = gemm::kStepPieces * kPieceBytes;  // of a step
};
using Rows16 = BlockShape<16, 3, 0, 0>;
// Leaves room for blocks of the next kernel, which fill their rings meanwhile.
using Rows32 = BlockShape<32, 3, 0, 0, 110 * 1024>;
using Rows64 = BlockShape<64, 3, 32, 160>;
using Rows128 = BlockShape<128, 2, 24, 240>;

// Of a piece, the steps that warp `warp` of the streaming kernel multiplies.
__device__ __forceinline__ int steps_of(const ProductOperand& operand, int warp) {
  return max(0, min(operand.iterations, operand.piece_steps - warp * operand.iterations));
}
// Stages that hold all of them.
__device__ __forceinline__ int stages_of(const ProductOperand& operand, int warp) {
  return (operand.pieces * steps_of(operand, warp) + kStageSteps - 1) / kStageSteps;
}

constexpr int kMaxStages = 16;

// The barriers of the ring.
struct Ring {
  std::uint64_t full[kMaxStages], empty[kMaxStages];
};

// What a block has to do.
struct Tile {
  const ProductOperand& operand;
  int first_row, first_chunk, chunks;
  int step_bytes;             // in shared memory
  int stages;                 // of the ring
  std::uint32_t ring;         // addresses in shared memory: the first stage,
  std::uint32_t full, empty;  // and the barriers
};

// The steps in their order, whole stages of each warp of the streaming kernel.
class StepOrder {
 public:
  __device__ __forceinline__ explicit StepOrder(const ProductOperand& operand) : o_(operand) {
    begin_warp();
  }
  __device__ __forceinline__ bool is_over() const { return left_ == 0; }
  // Its first column; behind the last one, where there are zeros, if the stage is to be filled up.
  __device__ __forceinline__ int column() const {
    return piece_ < o_.pieces ? o_.first_column + column_ : o_.columns;
  }
  __device__ __forceinline__ void advance() {
    column_ += plan::kStepColumns;
    if (++step_ == steps_) {
      step_ = 0;
      ++piece_;
      column_ += (o_.piece_steps - steps_) * plan::kStepColumns;
    }
    if (--left_ > 0 || ++warp_ == plan::kConsumerWarps) return;
    begin_warp();
  }

 private:
  __device__ __forceinline__ void begin_warp() {
    steps_ = steps_of(o_, warp_);
    left_ = stages_of(o_, warp_) * kStageSteps;
    step_ = piece_ = 0;
    column_ = warp_ * o_.iterations * plan::kStepColumns;
  }

  const ProductOperand& o_;
  int warp_ = 0, piece_, step_, steps_, column_;
  int left_;  // of this warp
};

// A tile's place among the matrices.
struct TilePlace {
  const ProductOperand& operand;
  int first_chunk;
};
__device__ __forceinline__ TilePlace place_of_tile(const ProductParams& products, int tile) {
  int number = 0;
  while (tile >= products.operands[number].tiles) tile -= products.operands[number++].tiles;
  return {products.operands[number], tile * products.tile_chunks};
}

// For one thread.
template <typename Shape>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ProductParams& products, const Tile& tile)
      : t_(tile),
        o_(tile.operand),
        weights_(products.weight_maps[tile.operand.source]),
        inputs_(products.input_maps[tile.operand.source]) {}

  __device__ __forceinline__ void run() const {
    // The weights of the first stages are there before anything else is.
    StepOrder weights(o_);
    for (int stage = 0; stage < t_.stages && !weights.is_over(); ++stage) {
      mbarrier_arrive_expect(t_.full + 8 * stage, kStageSteps * t_.step_bytes);
      for (int i = 0; i < kStageSteps; ++i, weights.advance())
        copy_weights(stage, i, weights.column());
    }
    wait_for_dependencies();
    StepOrder inputs(o_);
    for (int stage = 0; stage < t_.stages && !inputs.is_over(); ++stage)
      for (int i = 0; i < kStageSteps; ++i, inputs.advance())
        copy_inputs(stage, i, inputs.column());
    RingPlace place;
    while (!inputs.is_over()) {
      mbarrier_wait(t_.empty + 8 * place.stage, place.parity);
      mbarrier_arrive_expect(t_.full + 8 * place.stage, kStageSteps * t_.step_bytes);
      for (int i = 0; i < kStageSteps; ++i, inputs.advance()) {
        copy_inputs(place.stage, i, inputs.column());
        copy_weights(place.stage, i, inputs.column());
      }
      place.advance(t_.stages);
    }
  }

 private:
  __device__ __forceinline__ std::uint32_t place_of(int stage, int step) const {
    return t_.ring + (stage * kStageSteps + step) * t_.step_bytes;
  }
  __device__ __forceinline__ void copy_inputs(int stage, int step, int column) const {
    tensor_copy_to_shared(place_of(stage, step), inputs_, 0, t_.first_row / 8,
                          column / plan::kStepColumns * gemm::kStepPieces, t_.full + 8 * stage);
  }
  __device__ __forceinline__ void copy_weights(int stage, int step, int column) const {
    tensor_copy_to_shared(place_of(stage, step) + Shape::kInputBytes, weights_, column,
                          t_.first_chunk * plan::kChunkRows, o_.layer, t_.full + 8 * stage);
  }

  const Tile& t_;
  const ProductOperand& o_;
  const CUtensorMap &weights_, &inputs_;
};

// Not inlined: it is long, and a thread has many pairs.
template <typename T>
__device__ __noinline__ std::uint32_t activated(Activation activation, float first, float second) {
  return pack<T>(activate(activation, first), activate(activation, second));
}

template <typename T, typename Shape>
class Consumer {
 public:
  __device__ __forceinline__ explicit Consumer(const Tile& tile) : t_(tile), o_(tile.operand) {
    const int thread = static_cast<int>(threadIdx.x);
    lane_ = thread % 32;
    // A warp has two chunks of those that its group has an equal share of.
    const int group = thread / kGroupThreads;
    const int share = (tile.chunks + Shape::kGroups - 1) / Shape::kGroups;
    first_chunk_ = group * share + thread % kGroupThreads / 32 * 2;
    end_chunk_ = min((group + 1) * share, tile.chunks);
    // Without one it multiplies the last one again, for nobody.
#pragma unroll
    for (int i = 0; i < 2; ++i)
      weight_[i] =
          Shape::kInputBytes +
          (min(first_chunk_ + i, tile.chunks - 1) * plan::kChunkRows + lane_ / 4) * kStepBytes +
          lane_ % 4 * 16;
  }

  __device__ __forceinline__ void run() {
    RingPlace place;
#pragma unroll 1
    for (int warp = 0; warp < plan::kConsumerWarps; ++warp) {
      const int stages = stages_of(o_, warp);
#pragma unroll 1
      for (int i = 0; i < stages; ++i) {
        mbarrier_wait(t_.full + 8 * place.stage, place.parity);
        multiply(t_.ring + place.stage * kStageSteps * t_.step_bytes);
        if (lane_ == 0) mbarrier_arrive(t_.empty + 8 * place.stage);
        place.advance(t_.stages);
      }
      end_warp(warp == 0);
    }
  }

  __device__ __forceinline__ void store(const ProductParams& p) const {
#pragma unroll
    for (int j = 0; j < Shape::kRows / 8; ++j) {
      const int row = t_.first_row + 8 * j + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float first = sum_[4 * j + 2 * i], second = sum_[4 * j + 2 * i + 1];
        if (o_.stream == plan::Stream::mlp_up)
          store_activated(p, row, i, first, second);
        else
          store(p, row, i, first, second);
      }
    }
  }

 private:
  static constexpr int kSums = Shape::kRows / 2;  // of a thread

  // Row of the matrix that this lane has of its warp's chunk `i`; none if it is outside.
  __device__ __forceinline__ int index(int i) const {
    return (t_.first_chunk + first_chunk_ + i) * plan::kChunkRows + lane_ / 4;
  }
  __device__ __forceinline__ bool has(int i) const {
    return first_chunk_ + i < end_chunk_ && index(i) < o_.rows;
  }

  // Two chains: the first halves of what the lanes have loaded, and the second.
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    uint4 weight[kStageSteps][2];
#pragma unroll
    for (int s = 0; s < kStageSteps; ++s)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        weight[s][i] = load_shared_4(stage + s * t_.step_bytes + weight_[i]);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kStageSteps; ++s) {
      const std::uint32_t inputs = stage + s * t_.step_bytes;
      const uint4 &low = weight[s][0], &high = weight[s][1];
      wgmma_64x16<T, Shape::kRows>(chain_[0], make_uint4(low.x, high.x, low.y, high.y),
                                   wgmma_operand(inputs, Shape::kPieceBytes));
      wgmma_64x16<T, Shape::kRows>(
          chain_[1], make_uint4(low.z, high.z, low.w, high.w),
          wgmma_operand(inputs + 2 * Shape::kPieceBytes, Shape::kPieceBytes));
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  // A warp of the streaming kernel would hand over its sums now; the first adds the biases.
  __device__ __forceinline__ void end_warp(bool is_first) {
    wgmma_results(chain_[0]);
    wgmma_results(chain_[1]);
    float bias[2] = {0.0f, 0.0f};
    if (is_first && o_.biases != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (has(i)) bias[i] = __ldg(o_.biases + index(i));
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sum_[i] += chain_[0][i] + chain_[1][i] + bias[i % 4 / 2];
      chain_[0][i] = chain_[1][i] = 0.0f;
    }
  }

  // `first` and `second` are those of `row` and the next one.
  __device__ __forceinline__ void store(const ProductParams& p, int row, int i, float first,
                                        float second) const {
    if (!has(i)) return;
    float* to = reinterpret_cast<float*>(o_.output) +
                static_cast<std::int64_t>(row) * o_.output_row + index(i);
    // Attention reads them as Lamport buffers.
    if (row < p.rows) lamport_store(to, first);
    if (row + 1 < p.rows) lamport_store(to + o_.output_row, second);
  }

  // A lane and the one that has the next row of the matrix, or the one before, share two rows'
  // words: lanes with an even one store `row`, the others the next.
  __device__ __forceinline__ void store_activated(const ProductParams& p, int row, int i,
                                                  float first, float second) const {
    const bool is_odd = lane_ / 4 % 2 != 0;
    const float other = __shfl_xor_sync(~0u, is_odd ? first : second, 4);
    row += is_odd ? 1 : 0;
    if (!has(i) || row >= p.rows) return;
    auto* to = reinterpret_cast<std::uint32_t*>(o_.output) +
               gemm::input_word(row, index(i) / 2, gemm::input_lines(p.rows));
    const float low = is_odd ? other : first, high = is_odd ? second : other;
    *to = o_.ablated ? 0 : activated<T>(p.activation, low, high);
  }

  const Tile& t_;
  const ProductOperand& o_;
  int lane_, first_chunk_, end_chunk_;  // chunks of the tile
  int weight_[2];                       // in a step, this lane's bytes of each chunk
  float chain_[2][kSums] = {};
  float sum_[kSums] = {};  // over the warps of the streaming kernel so far
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    product_kernel(const __grid_constant__ ProductParams p, int stages) {
  if constexpr (!kWarpgroups) return;
  start_dependents();
  extern __shared__ __align__(128) char shared[];
  __shared__ Ring ring;
  const int row_block = static_cast<int>(blockIdx.x) % p.row_blocks;
  const auto [operand, first_chunk] = place_of_tile(p, static_cast<int>(blockIdx.x) / p.row_blocks);
  const Tile tile{operand,
                  row_block * Shape::kRows,
                  first_chunk,
                  min(p.tile_chunks, operand.chunks - first_chunk),
                  Shape::kInputBytes + p.tile_chunks * plan::kChunkRows * kStepBytes,
                  stages,
                  shared_address(shared),
                  shared_address(ring.full),
                  shared_address(ring.empty)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], Shape::kConsumers);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x >= Shape::kConsumers * 32) {
    if constexpr (Shape::kMovesRegisters) give_up_registers<Shape::kProducerRegisters>();
    if (threadIdx.x >= (Shape::kConsumers + 1) * 32 || !elect_one()) return;
    Producer<Shape>(p, tile).run();
    return;
  }
  if constexpr (Shape::kMovesRegisters) take_registers<Shape::kConsumerRegisters>();
  Consumer<T, Shape> consumer(tile);
  consumer.run();
  consumer.store(p);
}

template <typename T, typename Shape>
void prepare() {
  check(cudaFuncSetAttribute(product_kernel<T, Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Shape::kSharedBytes),
        "reserving shared memory for products");
}

template <typename T, typename Shape>
void launch(const ProductParams& params, cudaStream_t stream) {
  const std::int64_t stage_bytes =
      kStageSteps * (Shape::kInputBytes + kStepBytes * plan::kChunkRows * params.tile_chunks);
  const int stages = std::min(kMaxStages, static_cast<int>(Shape::kSharedBytes / stage_bytes));
  const DependentLaunch how(dim3(static_cast<unsigned>(params.tiles * params.row_blocks)),
                            dim3(Shape::kThreads), static_cast<std::size_t>(stages * stage_bytes),
                            stream);
  check(cudaLaunchKernelEx(how.config(), product_kernel<T, Shape>, params, stages),
        "starting products of many rows");
}

// Calls function(shape) with the smallest block for so many rows.
template <typename Function>
auto with_shape(std::int32_t rows, const Function& function) {
  if (rows <= Rows16::kRows) return function(Rows16{});
  if (rows <= Rows32::kRows) return function(Rows32{});
  if (rows <= Rows64::kRows) return function(Rows64{});
  return function(Rows128{});
}

}  // namespace

ProductBlock product_block(std::int32_t rows) {
  return with_shape(rows, [](auto shape) {
    using Shape = decltype(shape);
    return ProductBlock{Shape::kRows, Shape::kMaxChunks};
  });
}

void prepare_products(DType dtype) {
  with_type(dtype, [](auto zero) {
    using T = decltype(zero);
    prepare<T, Rows16>();
    prepare<T, Rows32>();
    prepare<T, Rows64>();
    prepare<T, Rows128>();
  });
}

void launch_products(DType dtype, const ProductParams& params, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_shape(params.rows, [&](auto shape) { launch<T, decltype(shape)>(params, stream); });
  });
}

}  // namespace clusterfusion::cuda
