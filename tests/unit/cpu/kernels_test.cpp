// Each kernel against float64, on every instruction set.
#include "backend/cpu/kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "backend/backend.hpp"
#include "backend/cpu/rotary.hpp"
#include "support/random_model.hpp"
#include "support/reference_model.hpp"
#include "targets.hpp"

namespace clusterfusion::test {
namespace {

constexpr DType kDTypes[] = {DType::float16, DType::bfloat16, DType::float32};

void on_every_target(const std::function<void()>& check) {
  ASSERT_FALSE(usable_targets().empty());
  for (const std::int64_t target : usable_targets()) {
    const UseTarget use(target);
    SCOPED_TRACE(hwy::TargetName(target));
    ASSERT_STREQ(cpu::target_name(), hwy::TargetName(target));
    check();
  }
}

std::vector<float> random_values(std::size_t count, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> values(count);
  for (float& v : values) v = uniform(random);
  return values;
}

// Values in a dtype, and what they are after rounding to it.
struct Stored {
  std::vector<std::byte> bytes;
  std::vector<float> values;
};
Stored store(std::vector<float> values, DType dtype) {
  Stored stored;
  stored.bytes.resize(values.size() * static_cast<std::size_t>(size_of(dtype)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::float32) {
      std::memcpy(&stored.bytes[4 * i], &values[i], 4);
    } else {
      const std::uint16_t bits = narrow(values[i], dtype);
      std::memcpy(&stored.bytes[2 * i], &bits, 2);
      values[i] = widen(bits, dtype);
    }
  }
  stored.values = std::move(values);
  return stored;
}

// Sums of products with |terms| <= 1: the error of a 16-lane sum of n terms is at most
// (n / 16 + 4) half units of the last place of the sum of magnitudes.
TEST(Multiply, EqualsFloat64AndItselfForAnyNumberOfTokens) {
  on_every_target([] {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t cols : {1, 15, 16, 17, 32, 50, 256, 1000}) {
        const std::int64_t rows = 29, tokens = 11, stride = cpu::padded(cols) + 16;
        const Stored w = store(random_values(static_cast<std::size_t>(rows * cols), 1, 1), dtype);
        const std::vector<float> bias = random_values(static_cast<std::size_t>(rows), 1, 2);
        std::vector<float> in(static_cast<std::size_t>(tokens * stride), 0.0f);
        const auto values = random_values(static_cast<std::size_t>(tokens * cols), 1, 3);
        for (std::int64_t t = 0; t < tokens; ++t) {
          std::copy_n(values.begin() + t * cols, cols, in.begin() + t * stride);
        }
        std::vector<float> out(static_cast<std::size_t>(tokens * rows), 0.5f);
        cpu::Product p{{w.bytes.data(), dtype, rows, cols},
                       in.data(),
                       stride,
                       tokens,
                       out.data(),
                       rows,
                       bias.data(),
                       true};
        cpu::multiply(p, 0, rows);
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int64_t r = 0; r < rows; ++r) {
            double want = 0.5 + bias[static_cast<std::size_t>(r)], magnitude = std::abs(want);
            for (std::int64_t k = 0; k < cols; ++k) {
              const double term =
                  static_cast<double>(w.values[static_cast<std::size_t>(r * cols + k)]) *
                  in[static_cast<std::size_t>(t * stride + k)];
              want += term;
              magnitude += std::abs(term);
            }
            const double bound = 0x1p-24 * magnitude * (static_cast<double>(cols) / 16 + 8);
            ASSERT_NEAR(out[static_cast<std::size_t>(t * rows + r)], want, bound)
                << name_of(dtype) << " cols " << cols << " token " << t << " row " << r;
          }
        }
        // Any tokens, any rows: the same bits.
        for (const std::int64_t count : {1, 2, 3, 4, 5, 8}) {
          std::vector<float> again(static_cast<std::size_t>(tokens * rows), 0.5f);
          for (std::int64_t t = 0; t < tokens; t += count) {
            cpu::Product part = p;
            part.in += t * stride;
            part.out = again.data() + t * rows;
            part.tokens = std::min(count, tokens - t);
            for (std::int64_t r = 0; r < rows; r += 5 + count) {
              cpu::multiply(part, r, std::min(r + 5 + count, rows));
            }
          }
          ASSERT_EQ(again, out) << name_of(dtype) << " cols " << cols << " by " << count;
        }
      }
    }
  });
}

// The relative error of e^-y grows with that of y, a few units in 2^-23 times |y|, about |x| times
// a few. gelu_erf has an absolute error, too: 2^-24 |x|, half of what 1 + erf has in float32.
TEST(Activate, EqualsFloat64) {
  on_every_target([] {
    for (int a = 0; a <= static_cast<int>(Activation::identity); ++a) {
      const auto activation = static_cast<Activation>(a);
      std::vector<float> x = random_values(5001, 12.0f, 5);
      const auto small = random_values(1000, 1e-3f, 6);
      x.insert(x.end(), small.begin(), small.end());
      x.insert(x.end(), {0.0f, -0.0f, 60.0f, -60.0f, 1e-30f, -1e-30f, 88.0f, -88.0f, -200.0f});
      std::vector<float> y = x;
      cpu::activate(activation, y.data(), static_cast<std::int64_t>(y.size()));
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double want = reference_activation(activation, x[i]);
        const double conditioning = 4 + std::abs(static_cast<double>(x[i]));
        double bound = 0x1p-23 * (2 * conditioning * std::abs(want) + 1e-3);
        if (activation == Activation::gelu_erf) bound += 0x1p-24 * std::abs(x[i]);
        ASSERT_NEAR(y[i], want, bound) << "activation " << a << " at " << x[i];
      }
    }
  });
}

TEST(Activate, KeepsNanAndTakesInfinity) {
  on_every_target([] {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int a = 0; a <= static_cast<int>(Activation::identity); ++a) {
      float values[] = {NAN, kInf};
      cpu::activate(static_cast<Activation>(a), values, 2);
      EXPECT_TRUE(std::isnan(values[0])) << a;
      const auto activation = static_cast<Activation>(a);
      const bool bounded = activation == Activation::tanh || activation == Activation::sigmoid;
      EXPECT_EQ(values[1], bounded ? 1.0f : kInf) << a;
    }
  });
}

TEST(LayerNorm, EqualsFloat64) {
  on_every_target([] {
    for (const std::size_t count : {1, 2, 15, 16, 17, 64, 100, 1024, 5120}) {
      for (const float offset : {0.0f, 100.0f}) {  // a large mean must not spoil the variance
        auto x = random_values(count, 2.0f, 8);
        for (float& v : x) v += offset;
        const auto weight = random_values(count, 1.0f, 9), bias = random_values(count, 1.0f, 10);
        std::vector<float> y(
            static_cast<std::size_t>(cpu::padded(static_cast<std::int64_t>(count))), 7.0f);
        cpu::layer_norm(x.data(), weight.data(), bias.data(), 1e-5f,
                        static_cast<std::int64_t>(count), y.data());
        double mean = 0, variance = 0;
        for (const float v : x) mean += v / static_cast<double>(count);
        for (const float v : x) variance += (v - mean) * (v - mean) / static_cast<double>(count);
        const double scale = 1 / std::sqrt(variance + 1e-5);
        for (std::size_t i = 0; i < count; ++i) {
          // x - mean carries the rounding of the mean, which the scale multiplies.
          const double bound = 0x1p-23 * (8 + (std::abs(mean) + 2) * scale * 4);
          ASSERT_NEAR(y[i], (x[i] - mean) * scale * weight[i] + bias[i], bound) << count;
        }
        for (std::size_t i = count; i < y.size(); ++i) ASSERT_EQ(y[i], 0.0f) << "padding";
      }
    }
  });
}

TEST(Widen, IsExactForEveryValue) {
  on_every_target([] {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      std::vector<std::uint16_t> bits(65536);
      for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
      std::vector<float> got(bits.size());
      cpu::widen(dtype, reinterpret_cast<const std::byte*>(bits.data()), 65536, got.data());
      for (std::size_t i = 0; i < bits.size(); ++i) {
        const float want = widen(bits[i], dtype);
        ASSERT_TRUE(got[i] == want || (std::isnan(got[i]) && std::isnan(want))) << i;
      }
    }
  });
}

TEST(AllFinite, FindsEveryPlace) {
  on_every_target([] {
    std::vector<float> values = random_values(67, 1e38f, 1);
    const auto count = static_cast<std::int64_t>(values.size());
    EXPECT_TRUE(cpu::all_finite(values.data(), count));
    for (float& v : values) {
      for (const float bad : {std::numeric_limits<float>::infinity(), NAN}) {
        const float old = std::exchange(v, bad);
        EXPECT_FALSE(cpu::all_finite(values.data(), count));
        v = old;
      }
    }
  });
}

TEST(ReadMemory, ReadsEveryByte) {
  on_every_target([] {
    std::vector<std::byte> data(1003, std::byte{0});
    const auto bytes = static_cast<std::int64_t>(data.size());
    EXPECT_EQ(cpu::read_memory(data.data(), bytes), 0u);
    for (std::byte& b : data) {
      b = std::byte{1};
      EXPECT_NE(cpu::read_memory(data.data(), bytes), 0u);
      b = std::byte{0};
    }
  });
}

// Pages of one head, filled by store_key_value(); what was not written is NaN.
struct Cache {
  cpu::KvLayout layout;
  std::vector<std::vector<std::byte>> pages;
  std::vector<const std::byte*> addresses;
  std::vector<float> keys, values;  // as stored: [positions, head_dim]

  Cache(DType dtype, std::int64_t head_dim, std::int64_t positions)
      : layout{dtype, head_dim, cpu::padded(head_dim)} {
    const auto count = static_cast<std::size_t>(positions * head_dim);
    const auto k = random_values(count, 1.0f, 21), v = random_values(count, 1.0f, 22);
    keys = store(k, dtype).values;
    values = store(v, dtype).values;
    const auto bytes = static_cast<std::size_t>(layout.elements() * size_of(dtype));
    for (std::int64_t p = 0; p < positions; ++p) {
      if (p % kKvPagePositions == 0) pages.emplace_back(bytes, std::byte{0xff});
      cpu::store_key_value(layout, &k[static_cast<std::size_t>(p * head_dim)],
                           &v[static_cast<std::size_t>(p * head_dim)], p % kKvPagePositions,
                           pages.back().data());
    }
    for (const auto& page : pages) addresses.push_back(page.data());
  }
};

// The bound: scores of |s| <= 4 and weights that sum to one leave errors of a few units in 2^-23,
// and sums over n positions in page order some more.
TEST(Attend, EqualsFloat64AtEveryContext) {
  on_every_target([] {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t head_dim : {1, 16, 24, 64, 80, 256}) {
        for (const std::int64_t context : {1, 63, 64, 65, 128, 1000}) {
          const Cache cache(dtype, head_dim, context);
          const std::int64_t queries = std::min<std::int64_t>(context, 9);
          const auto query = random_values(static_cast<std::size_t>(queries * head_dim), 1, 23);
          std::vector<float> out(static_cast<std::size_t>(queries * head_dim));
          std::vector<float> scratch(static_cast<std::size_t>(cpu::attention_scratch(head_dim)));
          const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
          cpu::AttentionTask task{cache.layout,
                                  cache.addresses.data(),
                                  0,
                                  context - queries,
                                  queries,
                                  query.data(),
                                  head_dim,
                                  out.data(),
                                  head_dim,
                                  scale};
          cpu::attend(task, scratch.data());
          for (std::int64_t q = 0; q < queries; ++q) {
            const std::int64_t visible = context - queries + q + 1;
            std::vector<double> weight(static_cast<std::size_t>(visible));
            double sum = 0;
            for (std::int64_t p = 0; p < visible; ++p) {
              double score = 0;
              for (std::int64_t i = 0; i < head_dim; ++i) {
                score += static_cast<double>(query[static_cast<std::size_t>(q * head_dim + i)]) *
                         cache.keys[static_cast<std::size_t>(p * head_dim + i)];
              }
              sum += weight[static_cast<std::size_t>(p)] = std::exp(score * scale);
            }
            for (std::int64_t i = 0; i < head_dim; ++i) {
              double want = 0;
              for (std::int64_t p = 0; p < visible; ++p) {
                want += weight[static_cast<std::size_t>(p)] / sum *
                        cache.values[static_cast<std::size_t>(p * head_dim + i)];
              }
              ASSERT_NEAR(out[static_cast<std::size_t>(q * head_dim + i)], want, 32 * 0x1p-23)
                  << name_of(dtype) << " head " << head_dim << " context " << context;
            }
          }
        }
      }
    }
  });
}

TEST(StoreKeyValue, RoundsToNearestEven) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    const cpu::KvLayout layout{dtype, 1, 16};
    std::vector<std::uint16_t> page(static_cast<std::size_t>(layout.elements()));
    std::mt19937 random(3);
    for (int i = 0; i < 200000; ++i) {
      const auto bits = static_cast<std::uint32_t>(random());
      float value = 0;
      std::memcpy(&value, &bits, 4);
      if (i % 2 == 0)
        value = std::ldexp(static_cast<float>(bits % 65536), static_cast<int>(bits >> 27) - 40);
      cpu::store_key_value(layout, &value, &value, 5, reinterpret_cast<std::byte*>(page.data()));
      const std::uint16_t want = narrow(value, dtype);
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(widen(page[5], dtype)));
      } else {
        ASSERT_EQ(page[5], want) << value;
        ASSERT_EQ(page[64 + 5 * 16], want) << value;
      }
    }
  }
}

// transformers' rotate_half; values behind rotary_dim stay as they are.
TEST(Rotate, EqualsFloat64) {
  for (const std::int64_t rotary_dim : {0, 2, 16, 64}) {
    const auto half = static_cast<std::size_t>(rotary_dim / 2);
    const auto cos_sin = random_values(static_cast<std::size_t>(rotary_dim) + 1, 1.0f, 30);
    const auto before = random_values(80, 1.0f, 31);
    auto after = before;
    cpu::rotate(after.data(), cos_sin.data(), rotary_dim);
    for (std::size_t i = 0; i < half; ++i) {
      const double low = before[i], high = before[half + i];
      const double cos = cos_sin[i], sin = cos_sin[half + i];
      EXPECT_NEAR(after[i], low * cos - high * sin, 3 * 0x1p-24);
      EXPECT_NEAR(after[half + i], high * cos + low * sin, 3 * 0x1p-24);
    }
    for (std::size_t i = 2 * half; i < before.size(); ++i) EXPECT_EQ(after[i], before[i]);
  }
}

}  // namespace
}  // namespace clusterfusion::test
