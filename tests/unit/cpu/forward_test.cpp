// The whole forward pass against the float64 reference, over the family of models.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>

#include "sequences.hpp"
#include "support/random_model.hpp"
#include "support/reference_model.hpp"
#include "targets.hpp"

namespace clusterfusion::test {
namespace {

struct Shape {
  const char* name;
  std::int64_t hidden, heads, layers, intermediate, vocab, rotary_dim;
  Activation activation;
  bool parallel, attention_bias, tied;
  DType dtype, vector_dtype;
};
void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

constexpr DType kF16 = DType::float16, kBf16 = DType::bfloat16, kF32 = DType::float32;

const Shape kShapes[] = {
    {"head16", 64, 4, 3, 256, 301, 4, Activation::gelu_erf, true, true, false, kF16, kF16},
    {"head24_odd", 72, 3, 1, 100, 97, 24, Activation::gelu_tanh, false, true, true, kBf16, kBf16},
    {"head32", 96, 3, 2, 384, 130, 8, Activation::gelu_quick, true, false, false, kF32, kF32},
    {"head64", 128, 2, 3, 512, 257, 16, Activation::silu, false, false, false, kF16, kF32},
    {"head80", 160, 2, 2, 640, 101, 20, Activation::relu, true, true, true, kF16, kF16},
    {"head128", 128, 1, 1, 333, 64, 128, Activation::mish, true, true, false, kBf16, kF32},
    {"head256", 512, 2, 2, 128, 51, 64, Activation::tanh, false, true, false, kF32, kF32},
    {"no_rotary", 40, 5, 5, 77, 19, 0, Activation::relu_squared, true, true, false, kF16, kF16},
    {"sigmoid", 48, 2, 2, 50, 31, 2, Activation::sigmoid, true, true, false, kF16, kF16},
    {"linear", 34, 2, 3, 18, 23, 16, Activation::identity, false, true, false, kF32, kF32},
};

std::shared_ptr<const Model> model_of(const Shape& shape) {
  ModelConfig config = small_config();
  config.hidden_size = shape.hidden;
  config.num_heads = shape.heads;
  config.head_dim = shape.hidden / shape.heads;
  config.num_layers = shape.layers;
  config.intermediate_size = shape.intermediate;
  config.vocab_size = shape.vocab;
  config.rotary_dim = shape.rotary_dim;
  config.activation = shape.activation;
  config.parallel_residual = shape.parallel;
  config.attention_bias = shape.attention_bias;
  config.tied_embeddings = shape.tied;
  config.dtype = shape.dtype;
  RandomModelOptions options;
  options.vector_dtype = shape.vector_dtype;
  options.seed = static_cast<std::uint64_t>(shape.hidden + shape.vocab);
  return make_random_model(config, options);
}

double largest_error(std::span<const float> got, std::span<const double> want) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - want[i]) <= worst)) worst = std::abs(got[i] - want[i]);
  }
  return worst;
}

double largest_magnitude(std::span<const double> values) {
  double worst = 0;
  for (const double v : values) worst = std::max(worst, std::abs(v));
  return worst;
}

class Forward : public testing::TestWithParam<Shape> {};

// Weights are exact in float32 and float64 alike, so all of the error is rounding of float32
// arithmetic. The bound, relative to the largest logit, is 32 units of the last place.
TEST_P(Forward, EqualsFloat64OnEveryInstructionSet) {
  constexpr double kBound = 32 * 0x1p-23;
  const auto model = model_of(GetParam());
  const auto tokens = random_tokens(model->config(), 70, 7);
  const std::vector<double> want = reference_logits(*model, tokens);
  std::vector<float> fused;
  for (const std::int64_t target : usable_targets()) {
    const UseTarget use(target);
    const auto backend = make_cpu_backend(model, {});
    SCOPED_TRACE(backend->info().device);
    const std::vector<float> got = all_logits(*backend, model->config(), tokens);
    EXPECT_LE(largest_error(got, want), kBound * largest_magnitude(want));
    if (!has_fused_multiply_add(target)) continue;
    if (fused.empty()) fused = got;
    EXPECT_EQ(got, fused) << "instruction sets with fused multiply-add must agree bit for bit";
  }
}

// The bound is the narrow type's own rounding of keys and values, a few times over.
TEST_P(Forward, NarrowKvCacheStaysClose) {
  const auto model = model_of(GetParam());
  const auto tokens = random_tokens(model->config(), 70, 7);
  const std::vector<double> want = reference_logits(*model, tokens);
  for (const auto& [dtype, unit] : {std::pair{kF16, 0x1p-11}, std::pair{kBf16, 0x1p-8}}) {
    BackendOptions options;
    options.kv_dtype = dtype;
    const auto backend = make_cpu_backend(model, options);
    EXPECT_EQ(backend->info().kv_dtype, dtype);
    const std::vector<float> got = all_logits(*backend, model->config(), tokens);
    EXPECT_LE(largest_error(got, want), 8 * unit * largest_magnitude(want)) << name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Family, Forward, testing::ValuesIn(kShapes),
                         [](const auto& info) { return std::string(info.param.name); });

// Many pages, many query blocks, and pieces longer than one internal run.
TEST(ForwardLong, EqualsFloat64AtAThousandPositions) {
  ModelConfig config = small_config();
  config.hidden_size = 32;
  config.num_heads = 2;
  config.num_layers = 1;
  config.intermediate_size = 16;
  config.vocab_size = 11;
  config.max_positions = 1100;
  const auto model = make_random_model(config);
  const auto tokens = random_tokens(config, 1000, 3);
  const auto backend = make_cpu_backend(model, {});
  const std::vector<float> got = all_logits(*backend, config, tokens);
  const std::vector<double> want = reference_logits(*model, tokens);
  EXPECT_LE(largest_error(got, want), 32 * 0x1p-23 * largest_magnitude(want));
}

}  // namespace
}  // namespace clusterfusion::test
