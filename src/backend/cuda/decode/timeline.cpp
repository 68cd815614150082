#include "backend/cuda/decode/timeline.hpp"

#include <algorithm>
#include <string_view>
#include <utility>

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {
namespace {

std::string_view phase_of_one_row(int point, bool lm_head) {
  switch (static_cast<TimelinePoint>(point)) {
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

// Where the residual is parallel the first phase is QKV and MLP up; else it is QKV, and the second
// one is all the others.
std::string_view phase_of_rows(int point, bool lm_head) {
  switch (static_cast<StreamPoint>(point)) {
    case StreamPoint::residual: return "wait for residual";
    case StreamPoint::normalised: return "LayerNorm";
    case StreamPoint::first_input: return "wait for input";
    case StreamPoint::first_phase: return "first products";
    case StreamPoint::attention: return "attention";
    case StreamPoint::second_input: return lm_head ? "wait for input" : "wait for second input";
    case StreamPoint::second_phase: return lm_head ? "LM head" : "second products";
    case StreamPoint::begin:
    case StreamPoint::count: break;
  }
  return "";
}

}  // namespace

std::size_t timeline_points(bool of_rows) {
  return static_cast<std::size_t>(of_rows ? static_cast<int>(StreamPoint::count)
                                          : static_cast<int>(TimelinePoint::count));
}

std::vector<TimelineEvent> timeline_events(std::span<const std::uint64_t> times,
                                           std::int32_t sm_count, std::int32_t num_layers,
                                           bool of_rows) {
  const std::size_t points = timeline_points(of_rows);
  const auto phase_before = of_rows ? phase_of_rows : phase_of_one_row;
  std::vector<TimelineEvent> events;
  for (std::int32_t sm = 0; sm < sm_count; ++sm) {
    for (std::int32_t epoch = 0; epoch <= num_layers; ++epoch) {
      const auto record =
          times.subspan((static_cast<std::size_t>(sm) * (num_layers + 1) + epoch) * points, points);
      std::vector<std::pair<std::uint64_t, int>> passed;
      for (std::size_t point = 0; point < points; ++point)
        if (record[point] != 0) passed.emplace_back(record[point], static_cast<int>(point));
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
