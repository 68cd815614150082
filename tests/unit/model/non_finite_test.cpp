#include "model/non_finite.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/tensor_view.hpp"
#include "clusterfusion/model.hpp"
#include "io/file_fixtures.hpp"
#include "model/checkpoint_builder.hpp"

namespace clusterfusion {
namespace {

using test::CheckpointBuilder;
using test::TemporaryFolder;

template <typename Bits>
std::optional<NonFinite> search(const std::vector<Bits>& values, DType dtype) {
  std::int64_t size = static_cast<std::int64_t>(values.size());
  DLTensor tensor{};
  tensor.data = const_cast<Bits*>(values.data());
  tensor.ndim = 1;
  tensor.shape = &size;
  tensor.dtype = to_dl(dtype);
  return first_non_finite(tensor);
}

TEST(FirstNonFinite, AgreesWithIsfiniteOnRandomBits) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    const std::uint32_t bits = random();
    const float wide = std::bit_cast<float>(bits);
    EXPECT_EQ(search<std::uint32_t>({bits}, DType::float32).has_value(), !std::isfinite(wide));
    const auto high = static_cast<std::uint16_t>(bits >> 16);
    const float narrow = std::bit_cast<float>(std::uint32_t{high} << 16);
    EXPECT_EQ(search<std::uint16_t>({high}, DType::bfloat16).has_value(), !std::isfinite(narrow));
  }
}

TEST(FirstNonFinite, FindsEachKindInEachDtype) {
  const auto value_of = [](std::uint32_t bits, DType dtype) {
    const auto found = dtype == DType::float32
                           ? search<std::uint32_t>({bits}, dtype)
                           : search<std::uint16_t>({static_cast<std::uint16_t>(bits)}, dtype);
    return found ? found->value : 0.0F;
  };
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(value_of(0x7C00, DType::float16), infinity);
  EXPECT_EQ(value_of(0xFC00, DType::float16), -infinity);
  EXPECT_TRUE(std::isnan(value_of(0x7C01, DType::float16)));
  EXPECT_TRUE(std::isnan(value_of(0xFE00, DType::float16)));
  EXPECT_EQ(value_of(0x7BFF, DType::float16), 0) << "65504 is finite";
  EXPECT_EQ(value_of(0x83FF, DType::float16), 0) << "subnormal numbers are finite";
  EXPECT_EQ(value_of(0x7F80, DType::bfloat16), infinity);
  EXPECT_EQ(value_of(0xFF80, DType::bfloat16), -infinity);
  EXPECT_TRUE(std::isnan(value_of(0x7FC0, DType::bfloat16)));
  EXPECT_EQ(value_of(0x7F7F, DType::bfloat16), 0);
  EXPECT_EQ(value_of(0x7F800000, DType::float32), infinity);
  EXPECT_EQ(value_of(0xFF800000, DType::float32), -infinity);
  EXPECT_TRUE(std::isnan(value_of(0x7F800001, DType::float32)));
  EXPECT_EQ(value_of(0x7F7FFFFF, DType::float32), 0);
}

TEST(FirstNonFinite, FindsTheFirstWhereverItIs) {
  for (const std::size_t size : {1U, 31U, 4096U, 4097U, 10'000U}) {
    for (const std::size_t index : {std::size_t{0}, size / 2, size - 1}) {
      std::vector<std::uint16_t> values(size, 0x3C00);
      EXPECT_FALSE(search(values, DType::float16).has_value());
      values[index] = 0x7E00;
      values.back() = 0x7C00;
      ASSERT_TRUE(search(values, DType::float16).has_value());
      EXPECT_EQ(search(values, DType::float16)->index, static_cast<std::int64_t>(index));
    }
  }
}

TEST(FindNonFinite, NamesTensorIndexValueAndFile) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.write(folder);
  EXPECT_EQ(Model::open(folder.path())->find_non_finite(), std::nullopt);

  // F16, little-endian: element 3 of a vector, row 2 and column 5 of a matrix.
  builder.at("gpt_neox.final_layer_norm.bias").data.replace(6, 2, "\x00\x7e", 2);
  builder.write(folder);
  const std::string file = (folder.path() / "model.safetensors").string();
  EXPECT_EQ(Model::open(folder.path())->find_non_finite(),
            "tensor gpt_neox.final_layer_norm.bias [3] = nan in " + file);
  builder.at("gpt_neox.layers.1.mlp.dense_4h_to_h.weight")
      .data.replace(2 * (2 * 12 + 5), 2, "\x00\xfc", 2);
  builder.write(folder);
  EXPECT_EQ(Model::open(folder.path())->find_non_finite(),
            "tensor gpt_neox.layers.1.mlp.dense_4h_to_h.weight [2, 5] = -inf in " + file);
}

}  // namespace
}  // namespace clusterfusion
