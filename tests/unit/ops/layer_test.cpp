// The layer calls on the CPU against a float64 layer.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
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
