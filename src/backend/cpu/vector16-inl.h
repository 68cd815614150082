// A vector of 16 floats on every instruction set, made of as many native vectors as it takes.
// Included once for each target (Highway's foreach_target.h).

#if defined(CLUSTERFUSION_BACKEND_CPU_VECTOR16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CLUSTERFUSION_BACKEND_CPU_VECTOR16_INL_H_
#undef CLUSTERFUSION_BACKEND_CPU_VECTOR16_INL_H_
#else
#define CLUSTERFUSION_BACKEND_CPU_VECTOR16_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend/cpu/kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, kLanes>;
using Native = hn::Vec<FloatTag>;
constexpr int kNativeLanes = static_cast<int>(hn::MaxLanes(FloatTag()));
constexpr int kParts = static_cast<int>(kLanes) / kNativeLanes;

// How far ahead of its use memory is asked for, for the second-level cache. Measured on Zen 4 for 1
// to 128 KB.
constexpr std::int64_t kPrefetchBytes = 4 << 10;
constexpr std::int64_t kCacheLine = 64;

#define CF_UNROLL _Pragma("GCC unroll 16")

struct Vector16 {
  Native part[kParts];
};

// f(part index) for each part, unrolled.
template <typename F>
HWY_INLINE Vector16 make16(F f) {
  Vector16 result;
  CF_UNROLL
  for (int i = 0; i < kParts; ++i) result.part[i] = f(i);
  return result;
}

HWY_INLINE Vector16 set16(float value) {
  const Native all = hn::Set(FloatTag(), value);
  return make16([&](int) HWY_ATTR { return all; });
}

template <typename T>
HWY_INLINE Native widen(const T* from) {
  const FloatTag d;
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<T, FloatTag>(), from));
}
HWY_INLINE Native widen(const float* from) { return hn::LoadU(FloatTag(), from); }

// (Targets are numbered from the best: those of x86 after AVX2 are SSE4, SSSE3 and, newer in
// Highway, SSE2.)
#if (HWY_ARCH_X86 && HWY_TARGET > HWY_AVX2) || HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
// Machines without such an instruction: exponent and fraction move up by 13 bits, the exponent's
// bias grows by 112; infinity and NaN, which Highway's emulation takes for numbers, keep all
// exponent bits.
HWY_INLINE Native widen(const hwy::float16_t* from) {
  const FloatTag d;
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::Rebind<std::uint16_t, FloatTag> dh;
  const auto bits = hn::PromoteTo(du, hn::LoadU(dh, reinterpret_cast<const std::uint16_t*>(from)));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000)));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fff));
  const Native scaled = hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(magnitude)), hn::Set(d, 0x1p112f));
  const auto special = hn::Gt(hn::BitCast(hn::RebindToSigned<FloatTag>(), magnitude),
                              hn::Set(hn::RebindToSigned<FloatTag>(), 0x7bff));
  const auto exponent = hn::IfThenElseZero(hn::RebindMask(du, special), hn::Set(du, 0x7f800000));
  return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(du, scaled), exponent), sign));
}
#endif

template <typename T>
HWY_INLINE Vector16 load16(const T* from) {
  return make16([&](int i) HWY_ATTR { return widen(from + i * kNativeLanes); });
}

HWY_INLINE void store16(const Vector16& v, float* to) {
  CF_UNROLL
  for (int i = 0; i < kParts; ++i) hn::StoreU(v.part[i], FloatTag(), to + i * kNativeLanes);
}

HWY_INLINE Vector16 add16(const Vector16& a, const Vector16& b) {
  return make16([&](int i) HWY_ATTR { return hn::Add(a.part[i], b.part[i]); });
}
HWY_INLINE Vector16 sub16(const Vector16& a, const Vector16& b) {
  return make16([&](int i) HWY_ATTR { return hn::Sub(a.part[i], b.part[i]); });
}
HWY_INLINE Vector16 mul16(const Vector16& a, const Vector16& b) {
  return make16([&](int i) HWY_ATTR { return hn::Mul(a.part[i], b.part[i]); });
}
HWY_INLINE Vector16 max16(const Vector16& a, const Vector16& b) {
  return make16([&](int i) HWY_ATTR { return hn::Max(a.part[i], b.part[i]); });
}
// a * b + c
HWY_INLINE Vector16 mul_add16(const Vector16& a, const Vector16& b, const Vector16& c) {
  return make16([&](int i) HWY_ATTR { return hn::MulAdd(a.part[i], b.part[i], c.part[i]); });
}
// Lanes from `count` on become `other`.
HWY_INLINE Vector16 first_lanes16(std::int64_t count, const Vector16& v, float other) {
  const FloatTag d;
  const Native rest = hn::Set(d, other);
  return make16([&](int i) HWY_ATTR {
    const std::int64_t left = count - i * kNativeLanes;
    const std::size_t lanes = left < 0 ? 0 : static_cast<std::size_t>(left);
    return hn::IfThenElse(hn::FirstN(d, lanes), v.part[i], rest);
  });
}

// Four lanes: what is left of a sum after lanes i and i + 8, then i and i + 4, were added.
using QuarterTag = hn::CappedTag<float, 4>;
constexpr int kQuarterParts = 4 / static_cast<int>(hn::MaxLanes(QuarterTag()));
struct Quarter {
  hn::Vec<QuarterTag> part[kQuarterParts];
};

// `V` is Vector16: a template parameter, so that only the branch of this target is compiled.
template <typename V, typename Combine>
HWY_INLINE Quarter fold_to_quarter(const V& v, Combine combine) {
  if constexpr (kParts >= 4) {
    Quarter result;
    constexpr int kStep = kQuarterParts;
    CF_UNROLL
    for (int i = 0; i < kStep; ++i) {
      result.part[i] = combine(combine(v.part[i], v.part[i + 2 * kStep]),
                               combine(v.part[i + kStep], v.part[i + 3 * kStep]));
    }
    return result;
  }
#if HWY_TARGET != HWY_SCALAR  // which has no halves
  else {
    const auto halve = [&](auto x) HWY_ATTR {
      const hn::Half<hn::DFromV<decltype(x)>> half;
      return combine(hn::LowerHalf(half, x), hn::UpperHalf(half, x));
    };
    if constexpr (kParts == 2) {
      return {{halve(combine(v.part[0], v.part[1]))}};
    } else {
      return {{halve(halve(v.part[0]))}};
    }
  }
#endif
}

HWY_INLINE void store_quarter(const Quarter& v, float* to) {
  CF_UNROLL
  for (int i = 0; i < kQuarterParts; ++i) {
    hn::StoreU(v.part[i], QuarterTag(), to + i * static_cast<int>(hn::MaxLanes(QuarterTag())));
  }
}

// Sum of the lanes, in the one order that all sums have: i with i + 8, + 4, + 2, + 1.
HWY_INLINE float sum16(const Vector16& v) {
  HWY_ALIGN float left[4];
  store_quarter(fold_to_quarter(v, [](auto a, auto b) HWY_ATTR { return hn::Add(a, b); }), left);
  return (left[0] + left[2]) + (left[1] + left[3]);
}

HWY_INLINE float largest16(const Vector16& v) {
  HWY_ALIGN float left[4];
  store_quarter(fold_to_quarter(v, [](auto a, auto b) HWY_ATTR { return hn::Max(a, b); }), left);
  const float even = left[0] > left[2] ? left[0] : left[2];
  const float odd = left[1] > left[3] ? left[1] : left[3];
  return even > odd ? even : odd;
}

// load16 of the first `count` < 16 values, zeros after them.
template <typename T>
HWY_INLINE Vector16 load_tail16(const T* from, std::int64_t count) {
  HWY_ALIGN T values[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) hwy::CopyBytes<sizeof(T)>(from + i, values + i);
  return load16(values);
}

// Calls f with a null pointer of the C++ type that stands for `dtype`.
template <typename F>
HWY_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float16: return f(static_cast<const hwy::float16_t*>(nullptr));
    case DType::bfloat16: return f(static_cast<const hwy::bfloat16_t*>(nullptr));
    case DType::float32: return f(static_cast<const float*>(nullptr));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace clusterfusion::cpu
HWY_AFTER_NAMESPACE();

#endif  // include guard
