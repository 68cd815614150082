// The layer calls on the CPU against a float64 layer.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <tuple>

#include "layer_fixture.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

using Values = std::vector<double>;

struct Reference {
  Values attention, intermediate, output, keys, values;
};

Values values_of(OwnedTensor& tensor, std::int64_t begin, std::int64_t count) {
  Values values;
  for (std::int64_t i = begin; i < begin + count; ++i) values.push_back(tensor.at(i));
  return values;
}

Values values_of(OwnedTensor& tensor) { return values_of(tensor, 0, tensor.count()); }

Values linear(LayerFixture& layer, const char* weight, const char* bias, const Values& in) {
  Values out = values_of(layer[bias]);
  for (std::size_t row = 0; row < out.size(); ++row) {
    for (std::size_t k = 0; k < in.size(); ++k) {
      out[row] += layer[weight].at(static_cast<std::int64_t>(row * in.size() + k)) * in[k];
    }
  }
  return out;
}

Values normalized(LayerFixture& layer, const char* weight, const char* bias, const Values& x) {
  const auto n = static_cast<double>(x.size());
  double mean = 0, variance = 0;
  for (const double v : x) mean += v / n;
  for (const double v : x) variance += (v - mean) * (v - mean) / n;
  Values out;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    out.push_back((x[i] - mean) / std::sqrt(variance + layer.options.layer_norm_eps) *
                      layer[weight].at(at) +
                  layer[bias].at(at));
  }
  return out;
}

Values rotated(LayerFixture& layer, Values head) {
  const auto half = static_cast<std::size_t>(layer.sizes.rotary_dim / 2);
  const Values before = head;
  for (std::size_t i = 0; i < 2 * half; ++i) {
    const double other = i < half ? -before[i + half] : before[i - half];
    const auto at = static_cast<std::int64_t>(i);
    head[i] = before[i] * layer["cos"].at(at) + other * layer["sin"].at(at);
  }
  return head;
}

// Attention of one head over the cache's rows before `position` and the new key and value.
Values attend(LayerFixture& layer, std::int64_t head, std::int64_t position, const Values& query,
              const Values& key, const Values& value) {
  const std::int64_t dim = layer.sizes.head_dim();
  const auto row = [&](const char* cache, std::int64_t p) {
    return values_of(layer[cache], p * layer.sizes.hidden + head * dim, dim);
  };
  Values weights;
  for (std::int64_t p = 0; p <= position; ++p) {
    const Values k = p < position ? row("k_cache", p) : key;
    double score = 0;
    for (std::size_t i = 0; i < k.size(); ++i) score += query[i] * k[i];
    weights.push_back(score / std::sqrt(static_cast<double>(dim)));
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& w : weights) sum += w = std::exp(w - largest);
  Values out(static_cast<std::size_t>(dim));
  for (std::int64_t p = 0; p <= position; ++p) {
    const Values v = p < position ? row("v_cache", p) : value;
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] += weights[static_cast<std::size_t>(p)] / sum * v[i];
    }
  }
  return out;
}

Values rounded(const Values& values, DType dtype) {
  Values out;
  for (const double v : values) out.push_back(widen(narrow(static_cast<float>(v), dtype), dtype));
  return out;
}

Reference reference(LayerFixture& layer, std::int64_t position, DType dtype) {
  const Values x = values_of(layer["input"]);
  const Values qkv =
      linear(layer, "weight_qkv", "bias_qkv", normalized(layer, "ln_weight", "ln_bias", x));
  Reference result;
  Values heads;
  const auto dim = static_cast<std::size_t>(layer.sizes.head_dim());
  for (std::int64_t head = 0; head < layer.sizes.num_heads; ++head) {
    const auto part = [&](std::size_t which) {
      const double* begin = qkv.data() + (static_cast<std::size_t>(head) * 3 + which) * dim;
      return Values(begin, begin + dim);
    };
    const Values key = rotated(layer, part(1));
    const Values out = attend(layer, head, position, rotated(layer, part(0)), rounded(key, dtype),
                              rounded(part(2), dtype));
    heads.insert(heads.end(), out.begin(), out.end());
    result.keys.insert(result.keys.end(), key.begin(), key.end());
    const Values value = part(2);
    result.values.insert(result.values.end(), value.begin(), value.end());
  }
  result.attention = linear(layer, "weight_o", "bias_o", heads);
  result.intermediate = linear(layer, "mlp_up_weight", "mlp_up_bias",
                               normalized(layer, "post_ln_weight", "post_ln_bias", x));
  for (double& v : result.intermediate) v = reference_activation(layer.options.activation, v);
  result.output = linear(layer, "mlp_down_weight", "mlp_down_bias", result.intermediate);
  for (std::size_t i = 0; i < x.size(); ++i) result.output[i] += x[i] + result.attention[i];
  return result;
}

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
        const Reference expected = reference(layer, position, dtype);
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
    const Reference expected = reference(layer, 7, DType::float16);
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
    Values expected =
        linear(layer, "mlp_down_weight", "mlp_down_bias", values_of(layer["mlp_intermediate"]));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      expected[i] += layer["input"].at(at) + layer["attn_output"].at(at);
    }
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
