// Weights times activations: the same dot products for one token and for many.
//
// Weights [rows, cols] and activations [tokens, cols] are both contiguous along k, so a register
// tile of tokens x rows needs no packing: every element of it has a 16-lane accumulator, and the
// weights are widened to float32 in registers. A tile's shape changes nothing about the order in
// which an element is summed.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/multiply.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/cache_control.h>

#include "backend/cpu/vector16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {

// Tokens in the largest register tile, and weight rows beside `tokens` of them: what the vector
// registers hold beside the operands.
constexpr int kMaxTileTokens = kParts == 1 ? 4 : kParts == 2 ? 3 : 1;
constexpr int tile_rows(int tokens) {
  if (kParts == 1) return tokens <= 2 ? 8 : 6;
  if (kParts == 2) return tokens == 1 ? 4 : 2;
  return 2;
}

// Four sums at once, each in sum16's order.
HWY_INLINE void sum4x16(const Vector16* acc, float* sums) {
#if HWY_TARGET == HWY_SCALAR  // which cannot move lanes
  for (int i = 0; i < 4; ++i) sums[i] = sum16(acc[i]);
#else
  const QuarterTag d;
  const auto add = [](auto a, auto b) HWY_ATTR { return hn::Add(a, b); };
  const auto q0 = fold_to_quarter(acc[0], add).part[0];
  const auto q1 = fold_to_quarter(acc[1], add).part[0];
  const auto q2 = fold_to_quarter(acc[2], add).part[0];
  const auto q3 = fold_to_quarter(acc[3], add).part[0];
  const auto q01 = hn::Add(hn::ConcatLowerLower(d, q1, q0), hn::ConcatUpperUpper(d, q1, q0));
  const auto q23 = hn::Add(hn::ConcatLowerLower(d, q3, q2), hn::ConcatUpperUpper(d, q3, q2));
  hn::StoreU(hn::Add(hn::ConcatEven(d, q23, q01), hn::ConcatOdd(d, q23, q01)), d, sums);
#endif
}

template <int kTokens, int kRows>
HWY_INLINE void finish_tile(const Product& p, std::int64_t row, std::int64_t token,
                            const Vector16 (&acc)[kTokens * kRows]) {
  constexpr int kTile = kTokens * kRows;
  float sums[kTile];
  int done = 0;
  CF_UNROLL
  for (; done + 4 <= kTile; done += 4) sum4x16(acc + done, sums + done);
  CF_UNROLL
  for (; done < kTile; ++done) sums[done] = sum16(acc[done]);
  for (int t = 0; t < kTokens; ++t) {
    float* out = p.out + (token + t) * p.out_stride + row;
    for (int r = 0; r < kRows; ++r) {
      float value = sums[t * kRows + r];
      if (p.bias != nullptr) value += p.bias[row + r];
      out[r] = p.add_to_out ? out[r] + value : value;
    }
  }
}

template <typename T, int kTokens, int kRows>
HWY_NOINLINE void multiply_tile(const Product& p, const T* weights, std::int64_t row,
                                std::int64_t token) {
  const std::int64_t cols = p.weights.cols;
  const T* w = weights + row * cols;
  const float* a = p.in + token * p.in_stride;
  Vector16 acc[kTokens * kRows];
  CF_UNROLL
  for (int i = 0; i < kTokens * kRows; ++i) acc[i] = set16(0.0f);

  const auto step = [&](std::int64_t k, auto load_weights) HWY_ATTR {
    Vector16 wide[kRows];
    CF_UNROLL
    for (int r = 0; r < kRows; ++r) wide[r] = load_weights(w + r * cols + k);
    CF_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Vector16 in = load16(a + t * p.in_stride + k);
      CF_UNROLL
      for (int r = 0; r < kRows; ++r) {
        acc[t * kRows + r] = mul_add16(in, wide[r], acc[t * kRows + r]);
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) {
    if constexpr (kTokens == 1) {
      // The next tile's rows, which lie right behind these.
      CF_UNROLL
      for (int r = 0; r < kRows; ++r) hwy::Prefetch(w + (kRows + r) * cols + k);
    }
    step(k, [](const T* from) HWY_ATTR { return load16(from); });
  }
  if (k < cols) {
    step(k, [&](const T* from) HWY_ATTR { return load_tail16(from, cols - k); });
  }
  finish_tile<kTokens, kRows>(p, row, token, acc);
}

// All rows for `kTokens` tokens from `token` on.
template <typename T, int kTokens>
HWY_INLINE std::int64_t multiply_rows(const Product& p, const T* weights, std::int64_t row,
                                      std::int64_t row_end, std::int64_t token) {
  constexpr int kRows = tile_rows(kTokens);
  for (; row + kRows <= row_end; row += kRows) {
    multiply_tile<T, kTokens, kRows>(p, weights, row, token);
  }
  for (; row < row_end; ++row) multiply_tile<T, kTokens, 1>(p, weights, row, token);
  return row;
}

template <typename T>
void multiply_typed(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  const T* weights = reinterpret_cast<const T*>(p.weights.data);
  // A few rows at a time stay in the nearest cache while all tokens pass by.
  constexpr std::int64_t kGroup = tile_rows(kMaxTileTokens);
  if (p.tokens == 1) {
    multiply_rows<T, 1>(p, weights, row_begin, row_end, 0);
    return;
  }
  for (std::int64_t row = row_begin; row < row_end; row += kGroup) {
    const std::int64_t end = row + kGroup < row_end ? row + kGroup : row_end;
    std::int64_t token = 0;
    for (; token + kMaxTileTokens <= p.tokens; token += kMaxTileTokens) {
      multiply_rows<T, kMaxTileTokens>(p, weights, row, end, token);
    }
    const std::int64_t left = p.tokens - token;
    if constexpr (kMaxTileTokens >= 4) {
      if (left == 3) multiply_rows<T, 3>(p, weights, row, end, token);
    }
    if constexpr (kMaxTileTokens >= 3) {
      if (left == 2) multiply_rows<T, 2>(p, weights, row, end, token);
    }
    if (left == 1) multiply_rows<T, 1>(p, weights, row, end, token);
  }
}

void multiply_kernel(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  with_type(p.weights.dtype, [&](auto* null) HWY_ATTR {
    multiply_typed<std::remove_cv_t<std::remove_pointer_t<decltype(null)>>>(p, row_begin, row_end);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace clusterfusion::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterfusion::cpu {
HWY_EXPORT(multiply_kernel);

void multiply(const Product& product, std::int64_t row_begin, std::int64_t row_end) {
  HWY_DYNAMIC_DISPATCH(multiply_kernel)(product, row_begin, row_end);
}
}  // namespace clusterfusion::cpu
#endif
