#include "cli/chrome_trace.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

namespace clusterfusion::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kProcess = 1;

// Perfetto keeps thread 0 for the idle loop of an operating system.
std::int32_t thread_of(std::int32_t sm) { return sm + 1; }

Json metadata(const char* name, std::int32_t thread, const char* key, const Json& value) {
  return {
      {"name", name}, {"ph", "M"}, {"pid", kProcess}, {"tid", thread}, {"args", {{key, value}}}};
}

}  // namespace

std::string chrome_trace(std::span<const TimelineEvent> events, const std::string& title) {
  std::int64_t zero = std::numeric_limits<std::int64_t>::max();
  std::set<std::int32_t> sms;
  for (const TimelineEvent& event : events) {
    zero = std::min(zero, event.begin_ns);
    sms.insert(event.sm);
  }
  Json list = Json::array({metadata("process_name", thread_of(0), "name", title)});
  for (const std::int32_t sm : sms) {
    list.push_back(metadata("thread_name", thread_of(sm), "name", "SM " + std::to_string(sm)));
    list.push_back(metadata("thread_sort_index", thread_of(sm), "sort_index", sm));
  }
  for (const TimelineEvent& event : events) {
    list.push_back({{"name", event.phase},
                    {"ph", "X"},
                    {"ts", static_cast<double>(event.begin_ns - zero) * 1e-3},
                    {"dur", static_cast<double>(event.end_ns - event.begin_ns) * 1e-3},
                    {"pid", kProcess},
                    {"tid", thread_of(event.sm)},
                    {"args", {{"layer", event.layer}}}});
  }
  const Json trace = {{"displayTimeUnit", "ns"}, {"traceEvents", std::move(list)}};
  return trace.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace clusterfusion::cli
