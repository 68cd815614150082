// Products of many rows: against float64, and the same bits by every unit, for every number of
// rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/matrix_product.hpp"
#include "gpu_fixture.hpp"

namespace clusterfusion::cuda {
using test::GpuTest;
namespace {

template <typename T>
DeviceMemory on_device(const std::vector<T>& values) {
  DeviceMemory memory(static_cast<std::int64_t>(values.size() * sizeof(T)), "a test");
  check(cudaMemcpy(memory.as<>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "sending");
  return memory;
}

template <typename T>
std::vector<T> fetch(const DeviceMemory& memory) {
  std::vector<T> values(static_cast<std::size_t>(memory.bytes()) / sizeof(T));
  check(cudaDeviceSynchronize(), "multiplying");
  check(cudaMemcpy(values.data(), memory.as<>(), values.size() * sizeof(T), cudaMemcpyDeviceToHost),
        "fetching");
  return values;
}

struct Sizes {
  std::int64_t rows, in, out;
};

// One product's operands.
template <typename T>
struct Operands {
  Operands(const Sizes& sizes, unsigned seed) : sizes(sizes) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& values, std::int64_t count, float scale) {
      for (std::int64_t i = 0; i < count; ++i) values.push_back(scale * normal(random));
    };
    fill(x, sizes.rows * sizes.in, 1.0f);
    fill(weight, sizes.out * sizes.in, 1.0f / std::sqrt(static_cast<float>(sizes.in)));
    fill(bias, sizes.out, 1.0f);
    fill(gate, sizes.rows * sizes.out, 1.0f);
    fill(before, sizes.rows * sizes.out, 1.0f);
  }

  double sum(std::int64_t row, std::int64_t column) const {
    double sum = bias[column];
    for (std::int64_t i = 0; i < sizes.in; ++i)
      sum += static_cast<double>(static_cast<float>(x[row * sizes.in + i])) *
             static_cast<double>(static_cast<float>(weight[column * sizes.in + i]));
    return sum;
  }

  Sizes sizes;
  std::vector<T> x, weight;
  std::vector<float> bias, gate, before;
};

double silu(double x) { return x / (1 + std::exp(-x)); }

template <typename T>
double expected(const Operands<T>& of, ProductEpilogue epilogue, std::int64_t row,
                std::int64_t column) {
  const std::int64_t i = row * of.sizes.out + column;
  switch (epilogue) {
    case ProductEpilogue::store: return of.sum(row, column);
    case ProductEpilogue::add: return of.before[i] + of.sum(row, column);
    case ProductEpilogue::activate: return silu(of.sum(row, column));
    default: return silu(of.gate[i]) * of.sum(row, column);
  }
}

bool is_narrow(ProductEpilogue epilogue) {
  return epilogue == ProductEpilogue::activate || epilogue == ProductEpilogue::times_gate;
}

// The first `rows` rows, as bytes behind which there is a guard that must not change.
template <typename T>
std::string multiply(const Operands<T>& of, ProductEpilogue epilogue, ProductUnit unit,
                     std::int64_t rows, bool with_bias = true) {
  const DeviceMemory x = on_device(of.x), weight = on_device(of.weight), bias = on_device(of.bias),
                     gate = on_device(of.gate);
  constexpr std::size_t kGuard = 4096;
  const std::size_t bytes = static_cast<std::size_t>(rows * of.sizes.out) *
                            (is_narrow(epilogue) ? sizeof(T) : sizeof(float));
  std::vector<char> before(bytes + kGuard, '\x7e');
  if (epilogue == ProductEpilogue::add) std::memcpy(before.data(), of.before.data(), bytes);
  const DeviceMemory y = on_device(before);
  const DType dtype = std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16;
  const MatrixProducts products(dtype, Activation::silu, unit);
  products.multiply({.x = x.as<>(),
                     .weight = weight.as<>(),
                     .bias = with_bias ? bias.as<float>() : nullptr,
                     .gate = gate.as<float>(),
                     .y = y.as<>(),
                     .rows = rows,
                     .in = of.sizes.in,
                     .out = of.sizes.out,
                     .epilogue = epilogue},
                    nullptr);
  const std::vector<char> after = fetch<char>(y);
  EXPECT_TRUE(std::equal(after.begin() + static_cast<long>(bytes), after.end(),
                         before.begin() + static_cast<long>(bytes)))
      << "written behind the results";
  return {after.data(), bytes};
}

constexpr ProductEpilogue kEpilogues[] = {ProductEpilogue::store, ProductEpilogue::add,
                                          ProductEpilogue::activate, ProductEpilogue::times_gate};

constexpr ProductUnit kUnits[] = {ProductUnit::warp, ProductUnit::warpgroup};

class MatrixProduct : public GpuTest, public testing::WithParamInterface<Sizes> {
 protected:
  template <typename T>
  void compare() const {
    const Operands<T> of(GetParam(), 1);
    for (const ProductEpilogue epilogue : kEpilogues) {
      SCOPED_TRACE(static_cast<int>(epilogue));
      const std::string found = multiply(of, epilogue, ProductUnit::warp, of.sizes.rows);
      double worst = 0;
      for (std::int64_t i = 0; i < of.sizes.rows * of.sizes.out; i += 7) {
        const char* const at = found.data() + i * (is_narrow(epilogue) ? 2 : 4);
        const float value = is_narrow(epilogue)
                                ? static_cast<float>(*reinterpret_cast<const T*>(at))
                                : *reinterpret_cast<const float*>(at);
        const double right = expected(of, epilogue, i / of.sizes.out, i % of.sizes.out);
        worst = std::max(worst, std::abs(value - right) / (1 + std::abs(right)));
      }
      const double rounding = std::is_same_v<T, __half> ? 1e-3 : 8e-3;
      EXPECT_LT(worst, is_narrow(epilogue) ? rounding : 3e-5);
      // Of fewer rows, the same bits, by either unit.
      const std::int64_t counts[] = {of.sizes.rows, 1, of.sizes.rows / 2 + 1};
      for (const std::int64_t rows : counts) {
        for (const ProductUnit unit : kUnits) {
          if (unit == ProductUnit::warpgroup && !has_warpgroups(device_properties())) continue;
          const std::string again = multiply(of, epilogue, unit, rows);
          EXPECT_EQ(again, found.substr(0, again.size()))
              << rows << " rows, unit " << static_cast<int>(unit);
        }
      }
    }
  }
};

TEST_P(MatrixProduct, Float16) { compare<__half>(); }
TEST_P(MatrixProduct, Bfloat16) { compare<__nv_bfloat16>(); }

INSTANTIATE_TEST_SUITE_P(Sizes, MatrixProduct,
                         testing::Values(Sizes{1, 8, 4}, Sizes{3, 72, 36}, Sizes{17, 128, 100},
                                         Sizes{64, 64, 32}, Sizes{65, 200, 164},
                                         Sizes{129, 96, 320}, Sizes{200, 520, 1000},
                                         Sizes{1000, 136, 260}, Sizes{2100, 64, 1284},
                                         Sizes{300, 1000, 324}),
                         [](const auto& info) {
                           return std::to_string(info.param.rows) + "x" +
                                  std::to_string(info.param.in) + "x" +
                                  std::to_string(info.param.out);
                         });

// As a vocabulary has: rows of results begin anywhere.
TEST_F(GpuTest, ProductsOfOddWidth) {
  const Operands<__half> of({37, 64, 301}, 2);
  for (const ProductUnit unit : kUnits) {
    if (unit == ProductUnit::warpgroup && !has_warpgroups(device_properties())) continue;
    const std::string found = multiply(of, ProductEpilogue::store, unit, 37, false);
    for (std::int64_t i = 0; i < 37 * 301; ++i) {
      const double sum = of.sum(i / 301, i % 301) - of.bias[i % 301];
      ASSERT_NEAR(reinterpret_cast<const float*>(found.data())[i], sum, 3e-5) << i;
    }
  }
}

}  // namespace
}  // namespace clusterfusion::cuda
