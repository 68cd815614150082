// Element-wise functions of float vectors. NaN stays NaN everywhere.
// Included once for each target (Highway's foreach_target.h).

#if defined(CLUSTERFUSION_BACKEND_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CLUSTERFUSION_BACKEND_CPU_MATH_INL_H_
#undef CLUSTERFUSION_BACKEND_CPU_MATH_INL_H_
#else
#define CLUSTERFUSION_BACKEND_CPU_MATH_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>

#include "backend/cpu/vector16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {

// x within [low, high], and 0 for NaN: what Highway's functions take on every target.
HWY_INLINE Native clamp_of(Native x, float low, float high) {
  const FloatTag d;
  const Native number = hn::IfThenElseZero(hn::Eq(x, x), x);
  return hn::Min(hn::Max(number, hn::Set(d, low)), hn::Set(d, high));
}

// e^x within 1 ulp (2 where the result is subnormal); infinity above 88.72, 0 below -104.
HWY_INLINE Native exp_of(Native x) {
  const FloatTag d;
  constexpr float kLargest = 88.722839f;  // log(FLT_MAX)
  const Native result = hn::Exp(d, clamp_of(x, -105.0f, kLargest));
  const Native huge = hn::IfThenElse(hn::Gt(x, hn::Set(d, kLargest)), hn::Inf(d), result);
  return hn::IfThenElse(hn::Eq(x, x), huge, x);
}

// 1 / (1 + e^-x), without cancellation.
HWY_INLINE Native sigmoid_of(Native x) {
  const FloatTag d;
  const Native one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, exp_of(hn::Neg(x))));
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2 = erfc(-x / sqrt 2) / 2, within 2^-24
// of itself or of one, whichever is more: for |z| = |x| / sqrt 2 above 0.93 from log erfc(|z|),
// which is close to a polynomial and leaves nothing to cancel, and below from erf. Minimax
// coefficients of N. Juffa's erff().
HWY_INLINE Native normal_cdf_of(Native x) {
  const FloatTag d;
  const auto c = [&](float value) HWY_ATTR { return hn::Set(d, value); };
  const Native half = c(0.5f);
  const Native z = hn::Mul(x, c(0.70710678f));
  const Native t = hn::Abs(z);
  const Native s = hn::Mul(z, z);

  Native log_erfc = hn::MulAdd(c(-1.72853470e-5f), t, c(3.83197126e-4f));
  const Native u = hn::MulAdd(c(-3.88396438e-3f), t, c(2.42546219e-2f));
  log_erfc = hn::MulAdd(log_erfc, s, u);
  log_erfc = hn::MulAdd(log_erfc, t, c(-1.06777877e-1f));
  log_erfc = hn::MulAdd(log_erfc, t, c(-6.34846687e-1f));
  log_erfc = hn::MulAdd(log_erfc, t, c(-1.28717512e-1f));
  log_erfc = hn::MulAdd(log_erfc, t, hn::Neg(t));
  const Native tail = hn::Mul(half, exp_of(log_erfc));
  const Native outer = hn::IfThenElse(hn::Lt(z, hn::Zero(d)), tail, hn::Sub(c(1.0f), tail));

  Native erf = c(-5.96761703e-4f);
  erf = hn::MulAdd(erf, s, c(4.99119423e-3f));
  erf = hn::MulAdd(erf, s, c(-2.67681349e-2f));
  erf = hn::MulAdd(erf, s, c(1.12819925e-1f));
  erf = hn::MulAdd(erf, s, c(-3.76125336e-1f));
  erf = hn::MulAdd(erf, s, c(1.28379166e-1f));
  erf = hn::MulAdd(erf, z, z);
  const Native inner = hn::MulAdd(half, erf, half);
  return hn::IfThenElse(hn::Gt(t, c(0.927734375f)), outer, inner);
}

// Highway's, within 4 ulp; 1 in float32 above 18.8.
HWY_INLINE Native tanh_of(Native x) {
  const Native result = hn::Tanh(FloatTag(), clamp_of(x, -20.0f, 20.0f));
  return hn::IfThenElse(hn::Eq(x, x), result, x);
}

// The formulas stand beside Activation in clusterfusion/model.hpp.
HWY_INLINE Native gelu_erf_of(Native x) { return hn::Mul(x, normal_cdf_of(x)); }

// (1 + tanh y) / 2 = sigmoid(2 y)
HWY_INLINE Native gelu_tanh_of(Native x) {
  const FloatTag d;
  const Native cubic = hn::Mul(hn::Mul(hn::Set(d, 0.044715f), hn::Mul(x, x)), x);
  const Native twice_y = hn::Mul(hn::Set(d, 1.5957691216f), hn::Add(x, cubic));  // 2 sqrt(2 / pi)
  return hn::Mul(x, sigmoid_of(twice_y));
}

HWY_INLINE Native relu_of(Native x) {
  const Native zero = hn::Zero(FloatTag());
  return hn::IfThenElse(hn::Lt(x, zero), zero, x);
}

// tanh(softplus x) = n / (n + 2) with n = w (w + 2), w = e^x; equal to 1 in float32 above 20.
HWY_INLINE Native mish_of(Native x) {
  const FloatTag d;
  const Native two = hn::Set(d, 2.0f);
  const Native limit = hn::Set(d, 20.0f);
  const Native w = exp_of(hn::IfThenElse(hn::Gt(x, limit), limit, x));
  const Native n = hn::Mul(w, hn::Add(w, two));
  return hn::Mul(x, hn::Div(n, hn::Add(n, two)));
}

}  // namespace HWY_NAMESPACE
}  // namespace clusterfusion::cpu
HWY_AFTER_NAMESPACE();

#endif  // include guard
