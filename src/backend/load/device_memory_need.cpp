#include "backend/load/device_memory_need.hpp"

#include "backend/backend.hpp"
#include "base/fail.hpp"

namespace clusterfusion {
namespace {

std::int64_t kv_bytes(const DeviceMemoryNeed& need) {
  return (need.positions + kKvPagePositions - 1) / kKvPagePositions * need.kv_page_bytes;
}

// What helps, the gentlest first.
std::string advice(const DeviceMemoryNeed& need, std::int64_t free, std::int64_t total) {
  const std::int64_t rest = need.weight_bytes + need.workspace_bytes;
  std::string advice;
  if (rest + need.kv_page_bytes <= free) {
    advice += fmt::format("ask for a context of at most {} positions, ",
                          (free - rest) / need.kv_page_bytes * kKvPagePositions);
  }
  if (rest + kv_bytes(need) <= total) advice += "close other programs on this GPU, ";
  return advice + "take a smaller model, or use device \"cpu\"";
}

}  // namespace

void require_fit(const DeviceMemoryNeed& need, std::int64_t free, std::int64_t total) {
  const std::int64_t needed = need.weight_bytes + need.workspace_bytes + kv_bytes(need);
  if (needed <= free) return;
  fail(ErrorKind::out_of_memory,
       "the model does not fit into the GPU's memory: {:.2f} GB of weights, {:.2f} GB of workspace "
       "and {:.2f} GB of KV cache for one sequence of {} positions make {:.2f} GB, and {:.2f} of "
       "{:.2f} GB are free; {}",
       need.weight_bytes * 1e-9, need.workspace_bytes * 1e-9, kv_bytes(need) * 1e-9, need.positions,
       needed * 1e-9, free * 1e-9, total * 1e-9, advice(need, free, total));
}

}  // namespace clusterfusion
