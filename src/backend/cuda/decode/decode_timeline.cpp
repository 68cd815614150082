#include "backend/cuda/decode/decode_timeline.hpp"

#include <algorithm>
#include <string_view>
#include <utility>

#include "backend/cuda/decode/decode_params.hpp"

namespace clusterfusion::cuda {
namespace {

std::string_view phase_before(TimelinePoint point, bool lm_head) {
  switch (point) {
    case TimelinePoint::input: return "wait for input";
    case TimelinePoint::normalised: return "LayerNorm";
    case TimelinePoint::qkv: return lm_head ? "LM head" : "QKV";
    case TimelinePoint::mlp_up: return "MLP up";
    case TimelinePoint::attention: return "attention";
    case TimelinePoint::mlp: return "wait for MLP up";
    case TimelinePoint::mlp_down: return "MLP down";
    case TimelinePoint::attention_in: return "wait for attention";
    case TimelinePoint::attention_out: return "attention output";
    case TimelinePoint::begin:
    case TimelinePoint::count: break;
  }
  return "";
}

}  // namespace

std::vector<TimelineEvent> timeline_events(std::span<const std::uint64_t> times,
                                           std::int32_t sm_count, std::int32_t num_layers) {
  constexpr auto kPoints = static_cast<std::size_t>(TimelinePoint::count);
  std::vector<TimelineEvent> events;
  for (std::int32_t sm = 0; sm < sm_count; ++sm) {
    for (std::int32_t epoch = 0; epoch <= num_layers; ++epoch) {
      const auto record = times.subspan(
          (static_cast<std::size_t>(sm) * (num_layers + 1) + epoch) * kPoints, kPoints);
      std::vector<std::pair<std::uint64_t, TimelinePoint>> passed;
      for (std::size_t point = 0; point < kPoints; ++point)
        if (record[point] != 0)
          passed.emplace_back(record[point], static_cast<TimelinePoint>(point));
      std::stable_sort(passed.begin(), passed.end(),
                       [](const auto& a, const auto& b) { return a.first < b.first; });
      const bool lm_head = epoch == num_layers;
      for (std::size_t i = 1; i < passed.size(); ++i)
        events.push_back({sm, lm_head ? -1 : epoch, phase_before(passed[i].second, lm_head),
                          static_cast<std::int64_t>(passed[i - 1].first),
                          static_cast<std::int64_t>(passed[i].first)});
    }
  }
  return events;
}

}  // namespace clusterfusion::cuda
