// Many rows times a layer's matrices, on tensor cores, with the partial sums of the streaming
// kernel in its order: a row has the same bits here and there, however many rows there are.
//
// A block multiplies up to 64 rows by a tile of up to 20 chunks (8 rows of a matrix each). A
// thread, the producer, brings steps of 32 columns by bulk copies of boxes, inputs and weights
// alike, into stages of two steps; each step lies there as [lines][64 bytes], so that eight lanes
// read 128 bytes side by side. The steps come in the order of the streaming kernel's warps
// (plan::ProductCut): all that its warp 0 sums, then all of warp 1, and so on, each a chain of its
// own, filled up with zeros to whole stages. Eight warps multiply.
#include <algorithm>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/gemm/paired_rows.cuh"
#include "backend/cuda/gemm/product_kernel.hpp"
#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/ptx/tensor_copy.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

using namespace device;

constexpr int kConsumerThreads = plan::kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 32;
constexpr int kStepBytes = plan::kStepColumns * 2;  // of one line
constexpr int kStageSteps = 2;

// What a block computes: kMTiles x 16 rows for each of kMWarps groups of warps; of the chunks, the
// warps of a group have up to kNTiles each.
template <int kTheMTiles, int kTheMWarps, int kTheNTiles, int kTheBlocks>
struct BlockShape {
  static constexpr int kMTiles = kTheMTiles, kMWarps = kTheMWarps, kNTiles = kTheNTiles;
  static constexpr int kBlocksOfMultiprocessor = kTheBlocks;
  static constexpr int kNWarps = plan::kConsumerWarps / kMWarps;
  static constexpr int kRows = 16 * kMTiles * kMWarps;
  static constexpr int kMaxChunks = kNTiles * kNWarps;
  static constexpr int kSumBytes = kMTiles * kNTiles * kConsumerThreads * 16;
};
using Rows32 = BlockShape<1, 2, 5, 2>;
using Rows64 = BlockShape<2, 2, 5, 1>;

// Of a piece, the steps that warp `warp` of the streaming kernel multiplies.
__device__ __forceinline__ int steps_of(const ProductOperand& operand, int warp) {
  return max(0, min(operand.iterations, operand.piece_steps - warp * operand.iterations));
}
// Stages that hold all of them.
__device__ __forceinline__ int stages_of(const ProductOperand& operand, int warp) {
  return (operand.pieces * steps_of(operand, warp) + kStageSteps - 1) / kStageSteps;
}

constexpr int kMaxStages = 8;

// The barriers of the ring.
struct Ring {
  std::uint64_t full[kMaxStages], empty[kMaxStages];
};
// One side's place in it.
struct Place {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
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

// For one thread.
template <typename Shape>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ProductParams& p, const Tile& tile)
      : t_(tile),
        o_(tile.operand),
        weights_(p.weight_maps[tile.operand.source]),
        inputs_(p.input_maps[tile.operand.source]) {}

  __device__ __forceinline__ void run() const {
    // The weights of the first stages are there before anything else is.
    StepOrder weights(o_);
    for (int stage = 0; stage < t_.stages && !weights.is_over(); ++stage) {
      mbarrier_arrive_expect(t_.full + 8 * stage, kStageSteps * t_.step_bytes);
      for (int i = 0; i < kStageSteps; ++i, weights.advance())
        copy_weights(stage, i, weights.column());
    }
    wait_for_dependencies();
    start_dependents();
    StepOrder inputs(o_);
    for (int stage = 0; stage < t_.stages && !inputs.is_over(); ++stage)
      for (int i = 0; i < kStageSteps; ++i, inputs.advance())
        copy_inputs(stage, i, inputs.column());
    Place place;
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
    tensor_copy_to_shared(place_of(stage, step), inputs_, column, t_.first_row,
                          t_.full + 8 * stage);
  }
  __device__ __forceinline__ void copy_weights(int stage, int step, int column) const {
    tensor_copy_to_shared(place_of(stage, step) + Shape::kRows * kStepBytes, weights_, column,
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
  // `sums`: in shared memory, Shape::kSumBytes.
  __device__ __forceinline__ Consumer(const Tile& tile, std::uint32_t sums)
      : t_(tile), o_(tile.operand), sums_(sums + static_cast<int>(threadIdx.x) * 16) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane_ = static_cast<int>(threadIdx.x) % 32;
    m_warp_ = warp % Shape::kMWarps;
    n_warp_ = warp / Shape::kMWarps;
    const int own = lane_ / 4 * kStepBytes + lane_ % 4 * 16;
    input_ = own + m_warp_ * Shape::kMTiles * 16 * kStepBytes;
    // A warp without a chunk multiplies the last one again, for nobody.
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n)
      weight_[n] =
          own + (Shape::kRows + min(chunk(n), tile.chunks - 1) * plan::kChunkRows) * kStepBytes;
  }

  __device__ __forceinline__ void run() {
    Place place;
#pragma unroll 1
    for (int warp = 0; warp < plan::kConsumerWarps; ++warp) {
      const int stages = stages_of(o_, warp);
#pragma unroll 1
      for (int i = 0; i < stages; ++i) {
        mbarrier_wait(t_.full + 8 * place.stage, place.parity);
        const std::uint32_t stage = t_.ring + place.stage * kStageSteps * t_.step_bytes;
        multiply(stage);
        multiply(stage + t_.step_bytes);
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(t_.empty + 8 * place.stage);
        place.advance(t_.stages);
      }
      if (warp == 0) start_dependents();  // behind the producer, as the first inputs are there
      end_warp(warp == 0);
    }
  }

  __device__ __forceinline__ void store(const ProductParams& p) const {
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      if (chunk(n) >= t_.chunks) continue;
#pragma unroll
      for (int m = 0; m < Shape::kMTiles; ++m) {
        const float4 sum = load_sum(m, n);
        const int row = t_.first_row + (m_warp_ * Shape::kMTiles + m) * 16 + lane_ / 4;
        if (row < p.rows) store_pair(p, row, index(n), sum.x, sum.y);
        if (row + 8 < p.rows) store_pair(p, row + 8, index(n), sum.z, sum.w);
      }
    }
  }

 private:
  __device__ __forceinline__ int chunk(int n) const { return n * Shape::kNWarps + n_warp_; }
  // Row of the matrix of this lane's first column of tile n.
  __device__ __forceinline__ int index(int n) const {
    return (t_.first_chunk + chunk(n)) * plan::kChunkRows + 2 * (lane_ % 4);
  }

  __device__ __forceinline__ void multiply(std::uint32_t step) {
    uint4 input[Shape::kMTiles][2], weight[Shape::kNTiles];  // inputs: lines 8 h + g of each 16
#pragma unroll
    for (int m = 0; m < Shape::kMTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        input[m][h] = load_shared_4(step + input_ + (16 * m + 8 * h) * kStepBytes);
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) weight[n] = load_shared_4(step + weight_[n]);
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n)
#pragma unroll
      for (int m = 0; m < Shape::kMTiles; ++m) {
        mma_16x8x16<T>(chain_[0][m][n], input[m][0], weight[n].x, weight[n].y);
        mma_16x8x16<T>(chain_[1][m][n], input[m][1], weight[n].z, weight[n].w);
      }
  }

  // This thread's sums over the warps of the streaming kernel so far.
  __device__ __forceinline__ std::uint32_t place_of(int m, int n) const {
    return sums_ + (m * Shape::kNTiles + n) * kConsumerThreads * 16;
  }
  __device__ __forceinline__ float4 load_sum(int m, int n) const {
    const uint4 bits = load_shared_4(place_of(m, n));
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                       __uint_as_float(bits.w));
  }

  // A warp of the streaming kernel would hand over its sums now; the first adds the biases.
  __device__ __forceinline__ void end_warp(bool is_first) {
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      float2 bias = make_float2(0.0f, 0.0f);
      if (is_first && o_.biases != nullptr && chunk(n) < t_.chunks) {
        if (index(n) < o_.rows) bias.x = __ldg(o_.biases + index(n));
        if (index(n) + 1 < o_.rows) bias.y = __ldg(o_.biases + index(n) + 1);
      }
#pragma unroll
      for (int m = 0; m < Shape::kMTiles; ++m) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!is_first) sum = load_sum(m, n);
        float(&first)[4] = chain_[0][m][n];
        float(&second)[4] = chain_[1][m][n];
        sum.x += first[0] + second[0] + bias.x;
        sum.y += first[1] + second[1] + bias.y;
        sum.z += first[2] + second[2] + bias.x;
        sum.w += first[3] + second[3] + bias.y;
        store_shared_4(place_of(m, n), sum);
#pragma unroll
        for (int i = 0; i < 4; ++i) first[i] = second[i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store_pair(const ProductParams& p, int row, int index,
                                             float first, float second) const {
    if (o_.stream == plan::Stream::mlp_up) {
      if (index >= o_.rows) return;
      auto* to = reinterpret_cast<std::uint32_t*>(o_.output) +
                 gemm::paired_word(row, index / 2, o_.output_row / 2);
      *to = o_.ablated ? 0 : activated<T>(p.activation, first, second);
      return;
    }
    float* to = reinterpret_cast<float*>(o_.output) +
                static_cast<std::int64_t>(row) * o_.output_row + index;
    // Attention reads them as Lamport buffers.
    if (index < o_.rows) lamport_store(to, first);
    if (index + 1 < o_.rows) lamport_store(to + 1, second);
  }

  const Tile& t_;
  const ProductOperand& o_;
  std::uint32_t sums_;
  int lane_, m_warp_, n_warp_;
  int input_, weight_[Shape::kNTiles];  // in a step, of this lane's first values
  float chain_[2][Shape::kMTiles][Shape::kNTiles][4] = {};
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksOfMultiprocessor)
    product_kernel(const __grid_constant__ ProductParams p, int stages) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Ring ring;
  const int row_block = static_cast<int>(blockIdx.x) % p.row_blocks;
  int number = 0, index = static_cast<int>(blockIdx.x) / p.row_blocks;
  while (index >= p.operands[number].tiles) index -= p.operands[number++].tiles;
  const ProductOperand& operand = p.operands[number];
  const int first_chunk = index * p.tile_chunks;
  const Tile tile{operand,
                  row_block * Shape::kRows,
                  first_chunk,
                  min(p.tile_chunks, operand.chunks - first_chunk),
                  (Shape::kRows + p.tile_chunks * plan::kChunkRows) * kStepBytes,
                  stages,
                  shared_address(shared) + Shape::kSumBytes,
                  shared_address(ring.full),
                  shared_address(ring.empty)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], plan::kConsumerWarps);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumerThreads) {
    if (elect_one()) Producer<Shape>(p, tile).run();
    return;
  }
  Consumer<T, Shape> consumer(tile, shared_address(shared));
  consumer.run();
  consumer.store(p);
}

// Shared memory of a block, where so many share a multiprocessor.
constexpr std::int32_t shared_bytes(int blocks) {
  return static_cast<std::int32_t>(kProductSharedBytes) / blocks;
}

template <typename T, typename Shape>
void prepare() {
  check(cudaFuncSetAttribute(product_kernel<T, Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes(Shape::kBlocksOfMultiprocessor)),
        "reserving shared memory for products");
}

template <typename T, typename Shape>
void launch(const ProductParams& params, cudaStream_t stream) {
  const auto kernel = product_kernel<T, Shape>;
  const std::int32_t stage_bytes =
      kStageSteps * kStepBytes * (Shape::kRows + plan::kChunkRows * params.tile_chunks);
  const std::int32_t room = shared_bytes(Shape::kBlocksOfMultiprocessor) - Shape::kSumBytes;
  const int stages = std::min(kMaxStages, room / stage_bytes);
  const std::int32_t bytes = Shape::kSumBytes + stages * stage_bytes;
  const DependentLaunch how(dim3(static_cast<unsigned>(params.tiles * params.row_blocks)),
                            dim3(kThreads), static_cast<std::size_t>(bytes), stream);
  check(cudaLaunchKernelEx(how.config(), kernel, params, stages), "starting products of many rows");
}

}  // namespace

ProductBlock product_block(std::int32_t rows) {
  if (rows <= Rows32::kRows) return {Rows32::kRows, Rows32::kMaxChunks};
  return {Rows64::kRows, Rows64::kMaxChunks};
}

void prepare_products(DType dtype) {
  with_type(dtype, [](auto zero) {
    prepare<decltype(zero), Rows32>();
    prepare<decltype(zero), Rows64>();
  });
}

void launch_products(DType dtype, const ProductParams& params, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (product_block(params.rows).rows == Rows32::kRows)
      launch<T, Rows32>(params, stream);
    else
      launch<T, Rows64>(params, stream);
  });
}

}  // namespace clusterfusion::cuda
