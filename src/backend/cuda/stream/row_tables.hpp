// Rows, the groups that share their attention, and page tables, on their way to the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/memory.hpp"
#include "backend/cuda/row_decoder.hpp"
#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {

class RowTables {
 public:
  // Room for `count` tables of up to `max_rows` rows, whose sequences have up to `max_pages` pages.
  RowTables(std::int32_t max_rows, std::int64_t max_pages, std::int32_t count);

  // Sends table `index`, and points `params` at it. `params` says how attention is split. Returns
  // what its tasks have at most.
  plan::TaskExtent send(std::span<const DecodeRow> rows, std::int32_t index, std::int32_t sm_count,
                        StreamParams& params, cudaStream_t stream);
  // Where row `row` of table `index` keeps its input, on the device.
  TokenId* input(std::int32_t index, std::size_t row) const noexcept;

 private:
  void fill(std::span<const DecodeRow> rows, char* host, const char* device);

  std::int32_t max_rows_, count_;
  std::int64_t max_pages_;
  std::int64_t groups_, pages_, bytes_;  // offsets in a table
  DeviceMemory device_;
  PinnedMemory host_;
};

}  // namespace clusterfusion::cuda
