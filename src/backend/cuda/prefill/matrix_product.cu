#include <algorithm>
#include <array>
#include <string>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/prefill/matrix_product.hpp"
#include "backend/cuda/prefill/matrix_product_kernel.cuh"
#include "backend/cuda/tensor_map.hpp"
#include "backend/cuda/with_type.cuh"
#include "clusterfusion/error.hpp"

namespace clusterfusion::cuda {
namespace {

using products::TileShape;

struct Machine {
  std::int64_t multiprocessors, shared_bytes;
  bool by_maps;  // copies by tensor maps
};

// Up to so many, mma.sync is quicker: its chains of sums are shorter.
constexpr std::int64_t kFewRows = 16;

std::int64_t tiles_of(std::int64_t size, int tile) { return (size + tile - 1) / tile; }

// One shape for a product.
template <typename Shape>
struct Candidate {
  Machine machine;
  const Product& product;

  std::int64_t row_tiles() const { return tiles_of(product.rows, Shape::kRows); }
  std::int64_t column_tiles() const {
    return tiles_of(product.out, Shape::kColumns * Shape::kCluster);
  }
  std::int64_t blocks() const { return row_tiles() * column_tiles() * Shape::kCluster; }
  std::int64_t steps() const { return tiles_of(product.in, products::kStepColumns); }
  // Whole units of eight rows, by which a stage's parts begin where they may.
  std::int64_t share_rows() const {
    return tiles_of(std::min<std::int64_t>(product.rows, Shape::kRows), 8 * Shape::kCluster) * 8;
  }
  std::int64_t input_bytes() const { return share_rows() * Shape::kCluster * products::kRowBytes; }
  std::int64_t stage_bytes() const {
    return input_bytes() + std::int64_t{Shape::kColumns} * products::kRowBytes;
  }
  // Products of a few rows leave room for others, of other streams: each by itself waits for memory
  // most of the time.
  std::int64_t blocks_per_sm() const {
    if (Shape::kGroups == 2) return 1;
    if (product.rows <= kFewRows) return 3;
    return blocks() <= machine.multiprocessors ? 1 : 2;
  }
  std::int64_t stages() const {
    constexpr std::int64_t kReserved = 1024;  // by CUDA, of each block
    const std::int64_t bytes = (machine.shared_bytes + kReserved) / blocks_per_sm() - kReserved -
                               Shape::kStripsBytes - products::kRingAlignment -
                               static_cast<std::int64_t>(sizeof(products::Ring));
    return std::min<std::int64_t>(products::kMaxStages, bytes / stage_bytes());
  }

  // What it takes, in cycles: by the tensor cores' rate, by that of copies and by their latency,
  // and what it costs to begin and to end.
  double cycles() const {
    if (stages() < 2) return 1e300;
    constexpr double kProductsPerCycle = 1860, kBytesPerCycle = 58, kLatency = 2000, kFixed = 5000;
    // A chain of sums has to wait for each before the next.
    const double chain = product.rows <= kFewRows ? 250 : Shape::kParts == 1 ? 340 : 410;
    const double multiplying = static_cast<double>(Shape::kRows) * Shape::kColumns *
                               products::kStepColumns / kProductsPerCycle;
    const double copying = static_cast<double>(stage_bytes()) / kBytesPerCycle;
    const std::int64_t waves = tiles_of(blocks(), static_cast<int>(machine.multiprocessors));
    return static_cast<double>(waves) * static_cast<double>(steps()) *
               std::max({multiplying, copying, chain, kLatency / static_cast<double>(stages())}) +
           kFixed + Shape::kRows * Shape::kColumns / 12.0;
  }
};

CUtensorMap map_of(DType dtype, const void* data, std::int64_t rows, std::int64_t columns,
                   int box_rows) {
  const std::array sizes{static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(rows)};
  const std::array strides{static_cast<std::uint64_t>(columns) * 2};
  const std::array box{std::uint32_t{products::kStepColumns}, static_cast<std::uint32_t>(box_rows)};
  return make_box_map({dtype, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B});
}

template <typename T, typename Shape, ProductUnit kUnit>
void launch(DType dtype, Activation activation, const Candidate<Shape>& chosen,
            cudaStream_t stream) {
  const auto kernel = products::multiply<T, Shape, kUnit>;
  const Product& product = chosen.product;
  const auto bytes = static_cast<std::size_t>(chosen.stages() * chosen.stage_bytes() +
                                              Shape::kStripsBytes + products::kRingAlignment);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "reserving shared memory for matrix products");
  products::ProductParams params{.bias = product.bias,
                                 .gate = product.gate,
                                 .y = product.y,
                                 .rows = static_cast<int>(product.rows),
                                 .out = static_cast<int>(product.out),
                                 .steps = static_cast<int>(chosen.steps()),
                                 .row_tiles = static_cast<int>(chosen.row_tiles()),
                                 .column_tiles = static_cast<int>(chosen.column_tiles()),
                                 .share_rows = static_cast<int>(chosen.share_rows()),
                                 .input_bytes = static_cast<int>(chosen.input_bytes()),
                                 .stage_bytes = static_cast<int>(chosen.stage_bytes()),
                                 .stages = static_cast<int>(chosen.stages()),
                                 .epilogue = product.epilogue,
                                 .activation = activation,
                                 .x_rows = product.x,
                                 .weight_rows = product.weight,
                                 .in = static_cast<int>(product.in)};
  if (chosen.machine.by_maps) {
    params.x =
        map_of(dtype, product.x, product.rows, product.in, static_cast<int>(chosen.share_rows()));
    params.weight = map_of(dtype, product.weight, product.out, product.in, Shape::kColumns);
  }
  const std::int64_t resident =
      chosen.machine.multiprocessors * chosen.blocks_per_sm() / Shape::kCluster * Shape::kCluster;
  const DependentLaunch how(dim3(static_cast<unsigned>(std::min(chosen.blocks(), resident))),
                            dim3(chosen.machine.by_maps ? Shape::kThreads : Shape::kMostThreads),
                            bytes, stream, Shape::kCluster);
  check(cudaLaunchKernelEx(how.config(), kernel, params), "multiplying matrices");
}

// Calls function(shape) for each that a unit has, the largest first.
template <ProductUnit kUnit, typename Function>
void for_each_shape(const Function& function) {
  if constexpr (kUnit == ProductUnit::warpgroup) {
    function(TileShape<2, 160, 2>{});
    function(TileShape<2, 128, 2>{});
    function(TileShape<1, 160, 1>{});
    function(TileShape<2, 96, 1>{});
    function(TileShape<2, 64, 1>{});
    function(TileShape<2, 32, 1>{});
    function(TileShape<1, 64, 1>{});
    function(TileShape<1, 32, 1>{});
  } else {
    function(TileShape<1, 128, 1, 1>{});
    function(TileShape<1, 64, 1, 1>{});
    function(TileShape<1, 32, 1, 1>{});
  }
}

// Calls function(candidate) with the shape that takes the least time.
template <ProductUnit kUnit, typename Function>
void with_shape(const Machine& machine, const Product& product, const Function& function) {
  double least = 1e301;
  for_each_shape<kUnit>([&](auto shape) {
    least = std::min(least, Candidate<decltype(shape)>{machine, product}.cycles());
  });
  bool done = false;
  for_each_shape<kUnit>([&](auto shape) {
    const Candidate<decltype(shape)> candidate{machine, product};
    if (done || candidate.cycles() > least) return;
    done = true;
    function(candidate);
  });
}

}  // namespace

MatrixProducts::MatrixProducts(DType dtype, Activation activation)
    : MatrixProducts(
          dtype, activation,
          has_warpgroups(device_properties()) ? ProductUnit::warpgroup : ProductUnit::warp) {}

MatrixProducts::MatrixProducts(DType dtype, Activation activation, ProductUnit unit)
    : dtype_(dtype), activation_(activation), unit_(unit) {
  const cudaDeviceProp properties = device_properties();
  if (unit == ProductUnit::warpgroup && !has_warpgroups(properties))
    throw Error(ErrorKind::unsupported,
                std::string(properties.name) + " has no products of warpgroups");
  by_maps_ = has_bulk_copies(properties);
  multiprocessors_ = properties.multiProcessorCount;
  shared_bytes_ = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
}

void MatrixProducts::multiply(const Product& product, cudaStream_t stream) const {
  const Machine machine{multiprocessors_, shared_bytes_, by_maps_};
  with_type(dtype_, [&](auto zero) {
    using T = decltype(zero);
    const auto by_unit = [&]<ProductUnit kUnit>() {
      with_shape<kUnit>(machine, product, [&]<typename Shape>(const Candidate<Shape>& chosen) {
        launch<T, Shape, kUnit>(dtype_, activation_, chosen, stream);
      });
    };
    if (unit_ == ProductUnit::warpgroup && product.rows > kFewRows)
      by_unit.template operator()<ProductUnit::warpgroup>();
    else
      by_unit.template operator()<ProductUnit::warp>();
  });
}

}  // namespace clusterfusion::cuda
