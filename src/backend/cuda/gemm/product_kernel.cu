// Many rows times a layer's matrices, on tensor cores, with the partial sums of the streaming
// kernel in its order: a row has the same bits here and there, however many rows there are.
//
// A block multiplies up to 64 rows by a tile of up to 24 chunks (8 rows of a matrix each). Steps of
// 32 columns come through stages of shared memory by asynchronous copies of 16 bytes, inputs and
// weights alike, each step as [rows][64 bytes]: eight lanes read 128 bytes side by side. The steps
// come in the order of the streaming kernel's warps (plan::ProductCut): all that its warp 0 sums,
// then all of warp 1, and so on, each a chain of its own.
#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_numbers.cuh"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/device/async_copy.cuh"
#include "backend/cuda/device/grid_dependency.cuh"
#include "backend/cuda/device/lamport_buffer.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/gemm/paired_rows.cuh"
#include "backend/cuda/gemm/product_kernel.hpp"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

using namespace device;

constexpr int kThreads = plan::kConsumerWarps * 32;
constexpr int kStepBytes = plan::kStepColumns * 2;  // of one row
constexpr int kStageSteps = 2;
static_assert(kStageSteps == 2);

// What a block computes: kMTiles x 16 rows for each of kMWarps groups of warps; of the chunks, the
// warps of a group have up to kNTiles each.
template <int kTheMTiles, int kTheMWarps, int kTheNTiles, int kTheStages>
struct BlockShape {
  static constexpr int kMTiles = kTheMTiles, kMWarps = kTheMWarps, kNTiles = kTheNTiles;
  static constexpr int kStages = kTheStages;
  static constexpr int kNWarps = plan::kConsumerWarps / kMWarps;
  static constexpr int kRows = 16 * kMTiles * kMWarps;
  static constexpr int kMaxChunks = kNTiles * kNWarps;
  static constexpr int kCopies = (kRows + plan::kChunkRows * kMaxChunks + kThreads / 4 - 1) /
                                 (kThreads / 4);  // of one thread for a step
  static constexpr int kBlocksOfMultiprocessor = kRows <= 32 ? 2 : 1;
};
using Rows16 = BlockShape<1, 1, 3, 5>;
using Rows32 = BlockShape<2, 1, 3, 5>;
using Rows64 = BlockShape<2, 2, 5, 6>;

// Of a piece, the steps that warp `warp` of the streaming kernel multiplies.
__device__ __forceinline__ int steps_of(const ProductOperand& operand, int warp) {
  return max(0, min(operand.iterations, operand.piece_steps - warp * operand.iterations));
}

// Copies of one thread: 16 bytes of some rows of each step, first the inputs', then the weights'.
// All lines of inputs are among the first copies of the threads.
template <typename Shape>
class Loader {
 public:
  static_assert(Shape::kRows <= kThreads / 4);

  __device__ __forceinline__ Loader(const ProductParams& p, const ProductOperand& operand,
                                    int first_row, int first_chunk, int chunks,
                                    std::uint32_t stages)
      : o_(operand), left_(operand.pieces * operand.piece_steps) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / 4;  // of the first copy; further ones are kThreads / 4 apart
    const int rows = Shape::kRows + chunks * plan::kChunkRows;
    has_input_ = row < Shape::kRows;
    step_bytes_ = rows * kStepBytes;
    next_.to = stages + thread * 16;
    begin_ = next_.to;
    end_ = next_.to + Shape::kStages * kStageSteps * step_bytes_;
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      const int line = row + i * (kThreads / 4);
      copies_ += line < rows;
      // What is behind the end of either is multiplied too, for nobody.
      const int weight = first_chunk * plan::kChunkRows + line - Shape::kRows;
      next_.from[i] =
          line < Shape::kRows
              ? operand.input + static_cast<std::int64_t>(min(first_row + line, p.lines - 1)) *
                                    operand.input_row_bytes
              : operand.weights +
                    static_cast<std::int64_t>(min(weight, operand.rows - 1)) * operand.row_bytes;
      next_.from[i] += thread % 4 * 16;
    }
    next_.run = steps_of(operand, 0);
  }

  // The weights of the steps that the ring has room for at first: they are there before anything
  // else is.
  __device__ __forceinline__ void begin() {
    Place place = next_;
    for (int step = 0; step < min(kAhead, left_); ++step)
      copy([&](int i) { return i > 0 || !has_input_; }, place);
  }
  // And then what they are multiplied by.
  __device__ __forceinline__ void begin_inputs() {
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      for (int i = 0; i < kStageSteps && left_ > 0; ++i, --left_)
        copy([&](int i) { return i == 0 && has_input_; }, next_);
      commit_copies();
    }
  }
  // The stage behind those under way. Its place must be free.
  __device__ __forceinline__ void load_stage() {
#pragma unroll
    for (int i = 0; i < kStageSteps; ++i)
      if (left_ > 0) {
        copy([](int) { return true; }, next_);
        --left_;
      }
    commit_copies();
  }

  __device__ __forceinline__ int step_bytes() const { return step_bytes_; }

 private:
  static constexpr int kAhead = (Shape::kStages - 1) * kStageSteps;

  // Of the step that comes next.
  struct Place {
    const char* from[Shape::kCopies];
    std::uint32_t to;
    int run;                  // steps that follow each other, this one the first
    int warp = 0, piece = 0;  // whose run it is
  };

  template <typename Which>
  __device__ __forceinline__ void copy(Which&& which, Place& place) const {
    int distance = kStepBytes;
    if (--place.run == 0) distance = next_run(place);
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      if (i < copies_ && which(i)) copy_16(place.to + i * (kThreads * 16), place.from[i]);
      place.from[i] += distance;
    }
    place.to += step_bytes_;
    if (place.to == end_) place.to = begin_;
  }
  // From a run's last step to the first of the next: that of the same warp in the next piece, or of
  // the next warp in the first.
  __device__ __forceinline__ int next_run(Place& place) const {
    const int last =
        place.piece * o_.piece_steps + place.warp * o_.iterations + steps_of(o_, place.warp) - 1;
    if (++place.piece == o_.pieces) {
      place.piece = 0;
      ++place.warp;
    }
    place.run = steps_of(o_, place.warp);
    return (place.piece * o_.piece_steps + place.warp * o_.iterations - last) * kStepBytes;
  }

  const ProductOperand& o_;
  int left_, step_bytes_;
  int copies_ = 0;
  bool has_input_;
  std::uint32_t begin_, end_;
  Place next_;
};

// Not inlined: it is long, and a thread has many pairs.
template <typename T>
__device__ __noinline__ std::uint32_t activated(Activation activation, float first, float second) {
  return pack<T>(activate(activation, first), activate(activation, second));
}

template <typename T, typename Shape>
class Tile {
 public:
  __device__ __forceinline__ Tile(const ProductOperand& operand, int first_chunk, int chunks)
      : o_(operand), first_chunk_(first_chunk), chunks_(chunks) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    g_ = lane / 4;
    q_ = lane % 4;
    m_warp_ = warp % Shape::kMWarps;
    n_warp_ = warp / Shape::kMWarps;
    left_ = o_.pieces * steps_of(o_, 0);
  }

  // One step, which lies at `stage`.
  __device__ __forceinline__ void multiply(std::uint32_t stage) {
    uint4 input[2][Shape::kMTiles];  // lines 8 h + g of each 16
    const std::uint32_t own = stage + g_ * kStepBytes + q_ * 16;
#pragma unroll
    for (int m = 0; m < Shape::kMTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        input[h][m] =
            load_shared_4(own + ((m_warp_ * Shape::kMTiles + m) * 16 + 8 * h) * kStepBytes);
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      if (chunk(n) >= chunks_) break;
      const uint4 weight =
          load_shared_4(own + (Shape::kRows + chunk(n) * plan::kChunkRows) * kStepBytes);
#pragma unroll
      for (int m = 0; m < Shape::kMTiles; ++m) {
        mma_16x8x16<T>(chain_[0][m][n], input[0][m], weight.x, weight.y);
        mma_16x8x16<T>(chain_[1][m][n], input[1][m], weight.z, weight.w);
      }
    }
    if (--left_ == 0) end_warp();
  }

  // The results, for rows from `first_row` on, of which there are `rows` in all.
  __device__ __forceinline__ void store(const ProductParams& p, int first_row) const {
#pragma unroll
    for (int m = 0; m < Shape::kMTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + (m_warp_ * Shape::kMTiles + m) * 16 + 8 * half + g_;
        if (row >= p.rows) continue;
#pragma unroll
        for (int n = 0; n < Shape::kNTiles; ++n)
          if (chunk(n) < chunks_)
            store_pair(p, row, index(n), sum_[m][n][2 * half], sum_[m][n][2 * half + 1]);
      }
  }

 private:
  __device__ __forceinline__ int chunk(int n) const { return n * Shape::kNWarps + n_warp_; }
  // Row of the matrix of this lane's first column of tile n.
  __device__ __forceinline__ int index(int n) const {
    return (first_chunk_ + chunk(n)) * plan::kChunkRows + 2 * q_;
  }

  // A warp of the streaming kernel would hand over its sums now; the first adds the biases.
  __device__ __forceinline__ void end_warp() {
    const bool adds = warp_ == 0 && o_.biases != nullptr;
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      float2 bias = make_float2(0.0f, 0.0f);
      if (adds && chunk(n) < chunks_) {
        if (index(n) < o_.rows) bias.x = __ldg(o_.biases + index(n));
        if (index(n) + 1 < o_.rows) bias.y = __ldg(o_.biases + index(n) + 1);
      }
#pragma unroll
      for (int m = 0; m < Shape::kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& first = chain_[0][m][n][i];
          float& second = chain_[1][m][n][i];
          sum_[m][n][i] += first + second + (i % 2 == 0 ? bias.x : bias.y);
          first = second = 0.0f;
        }
    }
    left_ = o_.pieces * steps_of(o_, ++warp_);
  }

  __device__ __forceinline__ void store_pair(const ProductParams& p, int row, int index,
                                             float first, float second) const {
    if (o_.stream == plan::Stream::mlp_up) {
      if (index >= o_.rows) return;
      auto* to = reinterpret_cast<std::uint32_t*>(o_.output) +
                 gemm::paired_word(row, index / 2, o_.output_row / 2);
      *to = activated<T>(p.activation, first, second);
      return;
    }
    float* to = reinterpret_cast<float*>(o_.output) +
                static_cast<std::int64_t>(row) * o_.output_row + index;
    // Attention reads them as Lamport buffers.
    if (index < o_.rows) lamport_store(to, first);
    if (index + 1 < o_.rows) lamport_store(to + 1, second);
  }

  const ProductOperand& o_;
  int first_chunk_, chunks_;
  int g_, q_, m_warp_, n_warp_;
  int warp_ = 0;  // of the streaming kernel
  int left_;      // steps of it
  float chain_[2][Shape::kMTiles][Shape::kNTiles][4] = {};
  float sum_[Shape::kMTiles][Shape::kNTiles][4] = {};
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksOfMultiprocessor)
    product_kernel(const __grid_constant__ ProductParams p) {
  extern __shared__ __align__(128) char shared[];
  const int row_block = static_cast<int>(blockIdx.x) % p.row_blocks;
  int tile = static_cast<int>(blockIdx.x) / p.row_blocks;
  int number = 0;
  while (tile >= p.operands[number].tiles) tile -= p.operands[number++].tiles;
  const ProductOperand& operand = p.operands[number];
  const int first_row = row_block * Shape::kRows;
  const int first_chunk = tile * p.tile_chunks;
  const int chunks = min(p.tile_chunks, operand.chunks - first_chunk);
  const int steps = operand.pieces * operand.piece_steps;

  const auto stages = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  Loader<Shape> loader(p, operand, first_row, first_chunk, chunks, stages);
  Tile<T, Shape> result(operand, first_chunk, chunks);
  loader.begin();
  wait_for_dependencies();
  start_dependents();
  loader.begin_inputs();
  std::uint32_t place = stages;
  const std::uint32_t end = stages + Shape::kStages * kStageSteps * loader.step_bytes();
#pragma unroll 1
  for (int step = 0; step < steps; step += kStageSteps) {
    wait_for_copies_but<Shape::kStages - 2>();
    __syncthreads();
    loader.load_stage();
    result.multiply(place);
    if (step + 1 < steps) result.multiply(place + loader.step_bytes());
    place += kStageSteps * loader.step_bytes();
    if (place == end) place = stages;
  }
  result.store(p, first_row);
}

template <typename T, typename Shape>
void launch(const ProductParams& params, cudaStream_t stream) {
  const auto kernel = product_kernel<T, Shape>;
  const std::size_t bytes = static_cast<std::size_t>(Shape::kStages) * kStageSteps * kStepBytes *
                            (Shape::kRows + plan::kChunkRows * params.tile_chunks);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "reserving shared memory for products");
  const DependentLaunch how(dim3(static_cast<unsigned>(params.tiles * params.row_blocks)),
                            dim3(kThreads), bytes, stream);
  check(cudaLaunchKernelEx(how.config(), kernel, params), "starting products of many rows");
}

}  // namespace

ProductBlock product_block(std::int32_t rows) {
  if (rows <= Rows16::kRows) return {Rows16::kRows, Rows16::kMaxChunks};
  if (rows <= Rows32::kRows) return {Rows32::kRows, Rows32::kMaxChunks};
  return {Rows64::kRows, Rows64::kMaxChunks};
}

void launch_products(DType dtype, const ProductParams& params, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (product_block(params.rows).rows) {
      case Rows16::kRows: return launch<T, Rows16>(params, stream);
      case Rows32::kRows: return launch<T, Rows32>(params, stream);
      default: return launch<T, Rows64>(params, stream);
    }
  });
}

}  // namespace clusterfusion::cuda
