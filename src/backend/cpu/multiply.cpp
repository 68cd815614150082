// Weights times activations: the same dot products for one token and for many.
//
// Weights [rows, cols] and activations [tokens, cols] are both contiguous along k, so a register
// tile of tokens x rows needs no packing: every element of it has a 16-lane accumulator, and the
// weights are widened to float32 in registers. A tile's shape changes nothing about the order in
// which an element is summed. The rows of a tile lie far apart, so that memory is read in several
// streams, each straight on; that is what decides the speed, also of many tokens.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/multiply.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <algorithm>

#include "backend/cpu/vector16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {

// Tokens that one pass over the rows takes: what the vector registers hold beside the operands.
constexpr int kPassTokens = kParts == 1 ? 8 : kParts == 2 ? 3 : 2;
// So many tokens are bound by reading the weights, and one pass takes all of them.
constexpr int kMostTokensOfAPass = kParts == 1 ? 10 : 4;
// Weights that stay in the second cache while several passes go over them.
constexpr std::int64_t kBlockBytes = 512 << 10;

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

// Adds bias and old value where wanted, and stores the sums of kTokens x kRows elements; rows lie
// `row_step` apart.
template <int kTokens, int kRows>
HWY_INLINE void finish(const Product& p, std::int64_t row, std::int64_t row_step,
                       std::int64_t token, const Vector16 (&acc)[kTokens * kRows]) {
  constexpr int kTile = kTokens * kRows;
  constexpr int kFours = kTile / 4 * 4;
  float sums[kTile];
  CF_UNROLL
  for (int i = 0; i < kFours; i += 4) sum4x16(acc + i, sums + i);
  CF_UNROLL
  for (int i = kFours; i < kTile; ++i) sums[i] = sum16(acc[i]);
  for (int t = 0; t < kTokens; ++t) {
    float* out = p.out + (token + t) * p.out_stride + row;
    for (int r = 0; r < kRows; ++r) {
      float value = sums[t * kRows + r];
      if (p.bias != nullptr) value += p.bias[row + r * row_step];
      out[r * row_step] = p.add_to_out ? out[r * row_step] + value : value;
    }
  }
}

// Rows row, row + row_step, ... row + (kStreams - 1) * row_step, and as many after each of them as
// `count` says: every stream reads on through memory.
template <typename T, int kTokens, int kStreams>
HWY_NOINLINE void stream(const Product& p, const T* weights, std::int64_t first, std::int64_t count,
                         std::int64_t row_step, std::int64_t token) {
  const std::int64_t cols = p.weights.cols;
  const std::int64_t step_elements = row_step * cols;
  const float* a = p.in + token * p.in_stride;
  constexpr std::int64_t kLineElements = kCacheLine / sizeof(T);
  constexpr std::int64_t kAhead = kPrefetchBytes / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t at = 0; at < std::min(kAhead, count * cols); at += kLineElements) {
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch(weights + first * cols + s * step_elements + at, 0, 2);
    }
  }
  for (std::int64_t row = first; row < first + count; ++row) {
    const T* w = weights + row * cols;
    Vector16 acc[kTokens * kStreams];
    CF_UNROLL
    for (int i = 0; i < kTokens * kStreams; ++i) acc[i] = set16(0.0f);
    const auto step = [&](std::int64_t k, auto load_weights) HWY_ATTR {
      Vector16 wide[kStreams];
      CF_UNROLL
      for (int s = 0; s < kStreams; ++s) wide[s] = load_weights(w + s * step_elements + k);
      CF_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Vector16 in = load16(a + t * p.in_stride + k);
        CF_UNROLL
        for (int s = 0; s < kStreams; ++s) {
          acc[t * kStreams + s] = mul_add16(in, wide[s], acc[t * kStreams + s]);
        }
      }
    };
    const auto load = [](const T* from) HWY_ATTR { return load16(from); };
    std::int64_t k = 0;
    for (; k + kLineElements <= cols; k += kLineElements) {
      CF_UNROLL
      for (int s = 0; s < kStreams; ++s) {
        __builtin_prefetch(w + s * step_elements + k + kAhead, 0, 2);
      }
      CF_UNROLL
      for (std::int64_t i = 0; i < kLineElements; i += kLanes) step(k + i, load);
    }
    for (; k + kLanes <= cols; k += kLanes) step(k, load);
    if (k < cols) {
      step(k, [&](const T* from) HWY_ATTR { return load_tail16(from, cols - k); });
    }
    finish<kTokens, kStreams>(p, row, row_step, token, acc);
  }
}

// The rows are cut into streams that are read at the same time. Measured on Zen 4: four streams
// read 1.1 to 1.3 times as fast as one.
template <typename T, int kTokens>
HWY_INLINE void stream_rows(const Product& p, const T* weights, std::int64_t row,
                            std::int64_t row_end, std::int64_t token) {
  constexpr int kAccumulators = kParts == 1 ? 24 : kParts == 2 ? 6 : 2;
  constexpr int kStreams = std::clamp(kAccumulators / kTokens, 1, 4);
  const std::int64_t each = (row_end - row) / kStreams;
  if (each > 0) stream<T, kTokens, kStreams>(p, weights, row, each, each, token);
  row += each * kStreams;
  if (row < row_end) stream<T, kTokens, 1>(p, weights, row, row_end - row, 0, token);
}

// stream_rows for a number of tokens known only now, at most kMostTokensOfAPass.
template <typename T, int kTokens = kMostTokensOfAPass>
HWY_INLINE void stream_few(const Product& p, const T* weights, std::int64_t row,
                           std::int64_t row_end, std::int64_t token, std::int64_t tokens) {
  if constexpr (kTokens > 0) {
    if (tokens == kTokens) return stream_rows<T, kTokens>(p, weights, row, row_end, token);
    stream_few<T, kTokens - 1>(p, weights, row, row_end, token, tokens);
  }
}

// Many tokens go over blocks of rows in passes of even sizes: one token that is left over would
// cost nearly as much as several.
template <typename T>
void multiply_typed(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  const T* weights = reinterpret_cast<const T*>(p.weights.data);
  if (p.tokens <= kMostTokensOfAPass) {
    return stream_few(p, weights, row_begin, row_end, 0, p.tokens);
  }
  const std::int64_t passes = (p.tokens + kPassTokens - 1) / kPassTokens;
  const std::int64_t row_bytes = p.weights.cols * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t block =
      std::max<std::int64_t>(kBlockBytes / row_bytes / kRowGroup, 1) * kRowGroup;
  for (std::int64_t row = row_begin; row < row_end; row += block) {
    const std::int64_t end = std::min(row + block, row_end);
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const std::int64_t token = p.tokens * pass / passes;
      stream_few(p, weights, row, end, token, p.tokens * (pass + 1) / passes - token);
    }
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
