// Kernels that look at one row of numbers at a time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/elementwise.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <cmath>

#include "backend/cpu/math-inl.h"
#include "backend/cpu/vector16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {

const char* target_name_kernel() { return hwy::TargetName(HWY_TARGET); }

// values[i] = f(values[i]); the tail goes through the same vector code.
template <typename F>
HWY_INLINE void for_each_value(float* values, std::int64_t count, F f) {
  const auto all = [&](const Vector16& v)
                       HWY_ATTR { return make16([&](int i) HWY_ATTR { return f(v.part[i]); }); };
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store16(all(load16(values + i)), values + i);
  if (i == count) return;
  HWY_ALIGN float tail[kLanes];
  store16(all(load_tail16(values + i, count - i)), tail);
  for (std::int64_t j = i; j < count; ++j) values[j] = tail[j - i];
}

void activate_kernel(Activation activation, float* values, std::int64_t count) {
  const auto run = [&](auto f) HWY_ATTR { for_each_value(values, count, f); };
  switch (activation) {
    case Activation::gelu_erf: return run([](Native x) HWY_ATTR { return gelu_erf_of(x); });
    case Activation::gelu_tanh: return run([](Native x) HWY_ATTR { return gelu_tanh_of(x); });
    case Activation::gelu_quick:
      return run([](Native x) HWY_ATTR {
        return hn::Mul(x, sigmoid_of(hn::Mul(hn::Set(FloatTag(), 1.702f), x)));
      });
    case Activation::relu: return run([](Native x) HWY_ATTR { return relu_of(x); });
    case Activation::relu_squared:
      return run([](Native x) HWY_ATTR { return hn::Mul(relu_of(x), relu_of(x)); });
    case Activation::silu: return run([](Native x) HWY_ATTR { return hn::Mul(x, sigmoid_of(x)); });
    case Activation::mish: return run([](Native x) HWY_ATTR { return mish_of(x); });
    case Activation::tanh: return run([](Native x) HWY_ATTR { return tanh_of(x); });
    case Activation::sigmoid: return run([](Native x) HWY_ATTR { return sigmoid_of(x); });
    case Activation::identity: return;
  }
}

// Sum of f(16 values) over `count` values, in the order of all sums.
template <typename F>
HWY_INLINE float sum_of(const float* x, std::int64_t count, F f) {
  Vector16 sum = set16(0.0f);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = add16(sum, f(load16(x + i)));
  if (i < count) {
    sum = add16(sum, first_lanes16(count - i, f(load_tail16(x + i, count - i)), 0.0f));
  }
  return sum16(sum);
}

void layer_norm_kernel(const float* x, const float* weight, const float* bias, float eps,
                       std::int64_t count, float* out) {
  const float n = static_cast<float>(count);
  const float mean = sum_of(x, count, [](const Vector16& v) HWY_ATTR { return v; }) / n;
  const Vector16 mean16 = set16(mean);
  const float squares = sum_of(x, count, [&](const Vector16& v) HWY_ATTR {
    const Vector16 off = sub16(v, mean16);
    return mul16(off, off);
  });
  const Vector16 scale = set16(1.0f / std::sqrt(squares / n + eps));
  const auto norm = [&](const Vector16& v, const Vector16& w, const Vector16& b)
                        HWY_ATTR { return mul_add16(mul16(sub16(v, mean16), scale), w, b); };
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store16(norm(load16(x + i), load16(weight + i), load16(bias + i)), out + i);
  }
  if (i < count) {
    const std::int64_t left = count - i;
    const Vector16 v =
        norm(load_tail16(x + i, left), load_tail16(weight + i, left), load_tail16(bias + i, left));
    store16(first_lanes16(left, v, 0.0f), out + i);
  }
}

void rms_norm_kernel(const float* x, const float* weight, float eps, std::int64_t count,
                     float* out) {
  const float squares = sum_of(x, count, [](const Vector16& v) HWY_ATTR { return mul16(v, v); });
  const Vector16 scale = set16(1.0f / std::sqrt(squares / static_cast<float>(count) + eps));
  const auto norm = [&](const Vector16& v, const Vector16& w)
                        HWY_ATTR { return mul16(mul16(v, scale), w); };
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store16(norm(load16(x + i), load16(weight + i)), out + i);
  if (i < count) {
    const std::int64_t left = count - i;
    const Vector16 v = norm(load_tail16(x + i, left), load_tail16(weight + i, left));
    store16(first_lanes16(left, v, 0.0f), out + i);
  }
}

void widen_kernel(DType dtype, const std::byte* from, std::int64_t count, float* to) {
  with_type(dtype, [&](auto* null) HWY_ATTR {
    const auto* values = reinterpret_cast<decltype(null)>(from);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store16(load16(values + i), to + i);
    if (i == count) return;
    HWY_ALIGN float tail[kLanes];
    store16(load_tail16(values + i, count - i), tail);
    for (std::int64_t j = i; j < count; ++j) to[j] = tail[j - i];
  });
}

bool all_finite_kernel(const float* values, std::int64_t count) {
  const FloatTag d;
  // x * 0 is 0 for a finite x and NaN otherwise; NaN stays in the sum.
  Native sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kNativeLanes <= count; i += kNativeLanes) {
    sum = hn::MulAdd(hn::LoadU(d, values + i), hn::Zero(d), sum);
  }
  float tail = 0.0f;
  for (; i < count; ++i) tail += values[i] * 0.0f;
  return tail == 0.0f && hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

// Four streams with prefetch, which is how this kind of machine reads fastest (see multiply.cpp).
std::uint64_t read_memory_kernel(const std::byte* data, std::int64_t bytes) {
  const hn::ScalableTag<std::uint64_t> d;
  constexpr std::int64_t kStep = static_cast<std::int64_t>(hn::MaxLanes(d)) * 8;
  const std::int64_t quarter = bytes / 4 / kCacheLine * kCacheLine;
  auto sum0 = hn::Zero(d), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  const auto load = [&](std::int64_t at) HWY_ATTR {
    return hn::LoadU(d, reinterpret_cast<const std::uint64_t*>(data + at));
  };
  for (std::int64_t i = 0; i < quarter; i += kCacheLine) {
    for (int stream = 0; stream < 4; ++stream) {
      __builtin_prefetch(data + stream * quarter + i + kPrefetchBytes, 0, 2);
    }
    for (std::int64_t at = i; at < i + kCacheLine; at += kStep) {
      sum0 = hn::Xor(sum0, load(at));
      sum1 = hn::Xor(sum1, load(at + quarter));
      sum2 = hn::Xor(sum2, load(at + 2 * quarter));
      sum3 = hn::Xor(sum3, load(at + 3 * quarter));
    }
  }
  std::uint64_t rest = 0;
  for (std::int64_t i = 4 * quarter; i < bytes; ++i) rest ^= static_cast<std::uint64_t>(data[i]);
  const auto sum = hn::Xor(hn::Xor(sum0, sum1), hn::Xor(sum2, sum3));
  return rest ^ hn::GetLane(hn::SumOfLanes(d, sum));
}

}  // namespace HWY_NAMESPACE
}  // namespace clusterfusion::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterfusion::cpu {
HWY_EXPORT(target_name_kernel);
HWY_EXPORT(activate_kernel);
HWY_EXPORT(layer_norm_kernel);
HWY_EXPORT(rms_norm_kernel);
HWY_EXPORT(widen_kernel);
HWY_EXPORT(all_finite_kernel);
HWY_EXPORT(read_memory_kernel);

const char* target_name() { return HWY_DYNAMIC_DISPATCH(target_name_kernel)(); }

void activate(Activation activation, float* values, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(activate_kernel)(activation, values, count);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(layer_norm_kernel)(x, weight, bias, eps, count, out);
}

void rms_norm(const float* x, const float* weight, float eps, std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(rms_norm_kernel)(x, weight, eps, count, out);
}

void widen(DType dtype, const std::byte* from, std::int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(widen_kernel)(dtype, from, count, to);
}

bool all_finite(const float* values, std::int64_t count) {
  return HWY_DYNAMIC_DISPATCH(all_finite_kernel)(values, count);
}

std::uint64_t read_memory(const std::byte* data, std::int64_t bytes) {
  return HWY_DYNAMIC_DISPATCH(read_memory_kernel)(data, bytes);
}
}  // namespace clusterfusion::cpu
#endif
