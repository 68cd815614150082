// What the layer calls on the CPU work on: a few rows of float32 values, and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend/cpu/kernels.hpp"

namespace clusterfusion::cpu {

// Float32 vectors of one width. Each is padded with zeros to a multiple of kLanes, as multiply()
// wants them.
class Rows {
 public:
  Rows() = default;
  Rows(std::int64_t count, std::int64_t width)
      : stride_(padded(width)), values_(static_cast<std::size_t>(count * stride_)) {}
  // Of `width` values each, one row behind the other.
  Rows(DType dtype, const void* values, std::int64_t count, std::int64_t width)
      : Rows(count, width) {
    const auto* from = static_cast<const std::byte*>(values);
    for (std::int64_t r = 0; r < count; ++r) {
      widen(dtype, from + r * width * size_of(dtype), width, row(r));
    }
  }

  bool empty() const noexcept { return values_.empty(); }
  std::int64_t stride() const noexcept { return stride_; }
  float* row(std::int64_t r) noexcept { return values_.data() + r * stride_; }
  const float* row(std::int64_t r) const noexcept { return values_.data() + r * stride_; }

 private:
  std::int64_t stride_ = 0;
  std::vector<float> values_;
};

// Runs task(i) for each i in [0, count) on a team of threads that all calls share. A call that
// finds the team busy computes alone; the results are the same.
void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task);

}  // namespace clusterfusion::cpu
