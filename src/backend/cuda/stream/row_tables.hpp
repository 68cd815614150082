// Rows, the groups that share their attention, and page tables, on their way to the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "backend/cuda/memory.hpp"
#include "backend/cuda/row_decoder.hpp"
#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {

class RowTables {
 public:
  // What there is room for, at most.
  struct Extent {
    std::int32_t rows;
    std::int64_t pages;  // of a sequence
    std::int32_t tables = 1;
    std::int32_t task_queries = plan::kQuadQueries;
  };
  explicit RowTables(const Extent& most);

  // Sends table `index`, and points `params` at it. `params` says how attention is split. Returns
  // what its tasks have at most.
  plan::TaskExtent send(std::span<const DecodeRow> rows, std::int32_t index, std::int32_t sm_count,
                        StreamParams& params, cudaStream_t stream);
  // Where row `row` of table `index` keeps its input, on the device.
  TokenId* input(std::int32_t index, std::size_t row) const noexcept;

 private:
  void fill(std::span<const DecodeRow> rows, char* host, const char* device);

  Extent most_;
  std::int64_t groups_, pages_, bytes_;  // offsets in a table
  DeviceMemory device_;
  PinnedMemory host_;
};

}  // namespace clusterfusion::cuda
