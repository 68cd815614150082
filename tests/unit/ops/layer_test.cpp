// The layer calls on the CPU against a float64 layer.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <tuple>

#include "reference_layer.hpp"

namespace clusterfusion::test {
namespace {

// Within a rounding to the 16-bit type and the errors of float32 sums.
void expect_rounded(OwnedTensor& tensor, const Values& expected, DType dtype, const char* name) {
  const double half_ulp = dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  ASSERT_EQ(tensor.count(), static_cast<std::int64_t>(expected.size())) << name;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(tensor.at(static_cast<std::int64_t>(i)), expected[i],
                half_ulp * std::fabs(expected[i]) + 1e-5)
        << name << "[" << i << "]";
  }
}

TEST(LayerOps, AgreesWithFloat64) {
  const LayerSizes shapes[] = {
      {},
      {64, 2, 256, 8, 70},   // head_dim 32
      {160, 2, 40, 20, 70},  // head_dim 80
      {256, 1, 64, 64, 70},  // head_dim 256
      {6, 3, 10, 0, 4},      // nothing is a multiple of anything; no rotation
      {44, 4, 17, 6, 130},   // head_dim 11
  };
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const LayerSizes& sizes : shapes) {
      for (const std::int64_t position :
           {std::int64_t{0}, std::int64_t{1}, sizes.max_positions / 2, sizes.max_positions - 1}) {
        SCOPED_TRACE(std::to_string(sizes.hidden) + " at " + std::to_string(position));
        LayerFixture layer(sizes, dtype);
        layer.tensors.current_seq_len.value = position;
        layer.options.rotary_dim = sizes.rotary_dim;
        const Reference expected = ReferenceLayer(layer, dtype).at(position);
        layer.run_decoder_layer();
        expect_rounded(layer["output"], expected.output, dtype, "output");
        layer.run_attention_mlp_up();
        expect_rounded(layer["attn_output"], expected.attention, dtype, "attn_output");
        expect_rounded(layer["mlp_intermediate"], expected.intermediate, dtype, "mlp_intermediate");
        expect_rounded(layer["k_new"], expected.keys, dtype, "k_new");
        expect_rounded(layer["v_new"], expected.values, dtype, "v_new");
      }
    }
  }
}

TEST(LayerOps, KnowsEveryActivation) {
  for (const Activation activation :
       {Activation::gelu_erf, Activation::gelu_tanh, Activation::gelu_quick, Activation::relu,
        Activation::relu_squared, Activation::silu, Activation::mish, Activation::tanh,
        Activation::sigmoid, Activation::identity}) {
    LayerFixture layer;
    layer.options.activation = activation;
    const Reference expected = ReferenceLayer(layer, DType::float16).at(7);
    layer.run_attention_mlp_up();
    expect_rounded(layer["mlp_intermediate"], expected.intermediate, DType::float16,
                   "mlp_intermediate");
  }
}

TEST(LayerOps, WritesOneRowOfTheCaches) {
  LayerFixture layer;
  layer.tensors.current_seq_len.value = 3;
  const auto keys = layer["k_cache"].bytes(), values = layer["v_cache"].bytes();
  layer.run_decoder_layer();
  const std::size_t row = static_cast<std::size_t>(layer.sizes.hidden) * 2;
  for (const auto& [cache, before, fresh] :
       {std::tuple{"k_cache", &keys, "k_new"}, std::tuple{"v_cache", &values, "v_new"}}) {
    const auto& after = layer[cache].bytes();
    for (std::size_t i = 0; i < after.size(); ++i) {
      const bool is_new = i / row == 3;
      ASSERT_EQ(after[i], is_new ? layer[fresh].bytes()[i % row] : (*before)[i]) << cache << i;
    }
  }
}

TEST(LayerOps, AddsUpTheParts) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    LayerFixture layer({}, dtype);
    layer.run_attention_mlp_up();
    layer.run_mlp_down();
    const Values expected =
        ReferenceLayer(layer, dtype)
            .output_of(values_of(layer["attn_output"]), values_of(layer["mlp_intermediate"]));
    expect_rounded(layer["output"], expected, dtype, "output");
  }
}

// Three rows with the same input at the same position, in pages of their own: each has the bits of
// caches of rows. Enough work for the team of threads.
TEST(LayerOps, FindsTheSameInPages) {
  constexpr std::int64_t kRows = 3, kPageSize = 16, kPages = 5;
  const LayerSizes sizes{512, 8, 256, 16, kPages * kPageSize, 2};
  LayerFixture layer(sizes);
  layer.tensors.current_seq_len.value = 70;
  const DLDataType half = to_dl(DType::float16);
  const auto row_bytes = static_cast<std::size_t>(sizes.kv_size()) * 2;
  OwnedTensor both(half, {kRows * kPages, 2, kPageSize, 2, 64}), input(half, {kRows, 512});
  OwnedTensor output(half, {kRows, 512}), cos({kDLFloat, 32, 1}, {kRows, 16}), sin = cos;
  OwnedTensor k_new(half, {kRows, 2, 64}), v_new = k_new, table({kDLInt, 32, 1}, {kRows, kPages});
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t i = 0; i < 512; ++i) input.set(row * 512 + i, layer["input"].at(i));
    for (std::int64_t i = 0; i < 16; ++i) {
      cos.set(row * 16 + i, layer["cos"].at(i));
      sin.set(row * 16 + i, layer["sin"].at(i));
    }
    for (std::int64_t i = 0; i < kPages; ++i) {
      const std::int64_t page = kRows * kPages - 1 - (row * kPages + i);
      table.as<std::int32_t>()[row * kPages + i] = static_cast<std::int32_t>(page);
      const std::size_t bytes = kPageSize * row_bytes, from = static_cast<std::size_t>(i) * bytes;
      std::byte* to = both.as<std::byte>() + static_cast<std::size_t>(page) * 2 * bytes;
      std::memcpy(to, layer["k_cache"].bytes().data() + from, bytes);
      std::memcpy(to + bytes, layer["v_cache"].bytes().data() + from, bytes);
    }
  }
  layer.run_decoder_layer();
  std::array<std::int64_t, 4> shape{kRows * kPages, kPageSize, 2, 64};
  std::array<std::int64_t, 4> strides{2 * kPageSize * 128, 128, 64, 1};
  ops::LayerTensors& tensors = layer.tensors;
  for (DLTensor* cache : {&tensors.k_cache, &tensors.v_cache}) {
    *cache = both.view();
    cache->ndim = 4;
    cache->shape = shape.data();
    cache->strides = strides.data();
  }
  tensors.v_cache.byte_offset = kPageSize * row_bytes;
  tensors.input = input.view();
  tensors.cos = cos.view();
  tensors.sin = sin.view();
  tensors.block_table = table.view();
  layer.layer = {output.view(), k_new.view(), v_new.view()};
  layer.run_decoder_layer();
  const std::vector<std::byte>& expected = layer["output"].bytes();
  for (std::size_t i = 0; i < output.bytes().size(); ++i)
    ASSERT_EQ(output.bytes()[i], expected[i % expected.size()]) << i;
}

TEST(LayerOps, GivesTheSameBitsFromSeveralThreads) {
  LayerSizes sizes{512, 8, 1024, 16, 100};  // enough work for the team of threads
  LayerFixture expected(sizes);
  expected.run_decoder_layer();
  constexpr int kThreads = 4, kRounds = 10;
  std::vector<std::thread> threads;
  std::atomic<int> equal = 0;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      LayerFixture layer(sizes);
      for (int round = 0; round < kRounds; ++round) {
        layer.run_decoder_layer();
        if (layer["output"].bytes() == expected["output"].bytes()) ++equal;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, kThreads * kRounds);
}

}  // namespace
}  // namespace clusterfusion::test
