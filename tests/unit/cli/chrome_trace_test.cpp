#include "cli/chrome_trace.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <vector>

namespace clusterfusion::cli {
namespace {

using Json = nlohmann::json;

// What a viewer makes of the document: rows by thread, with their names.
struct Row {
  std::string name;
  std::vector<Json> events;
};
std::map<int, Row> rows_of(const Json& trace) {
  std::map<int, Row> rows;
  for (const Json& event : trace.at("traceEvents")) {
    const std::string kind = event.at("ph");
    EXPECT_EQ(event.at("pid"), 1);
    if (kind == "X") rows[event.at("tid")].events.push_back(event);
    if (kind == "M" && event.at("name") == "thread_name") {
      rows[event.at("tid")].name = event.at("args").at("name");
    }
  }
  return rows;
}

TEST(ChromeTrace, HoldsEveryEventInTheRowOfItsSm) {
  const std::vector<TimelineEvent> events = {
      {.sm = 0, .layer = 0, .phase = "qkv", .begin_ns = 5'000'001'000, .end_ns = 5'000'001'250},
      {.sm = 131, .layer = 0, .phase = "qkv", .begin_ns = 5'000'000'750, .end_ns = 5'000'002'000},
      {.sm = 0,
       .layer = 31,
       .phase = "mlp \"up\"",
       .begin_ns = 5'000'003'001,
       .end_ns = 5'000'003'001},
      {.sm = 0,
       .layer = -1,
       .phase = "lm_head",
       .begin_ns = 5'000'004'000,
       .end_ns = 5'001'000'000}};
  const Json trace = Json::parse(chrome_trace(events, "a \"model\", context 16"));
  const std::map<int, Row> rows = rows_of(trace);
  ASSERT_EQ(rows.size(), 2u);
  const Row &first = rows.begin()->second, &last = rows.rbegin()->second;
  EXPECT_EQ(first.name, "SM 0");
  EXPECT_EQ(last.name, "SM 131");
  ASSERT_EQ(first.events.size(), 3u);
  ASSERT_EQ(last.events.size(), 1u);

  // Microseconds, from the earliest event on, to the nanosecond.
  EXPECT_EQ(last.events[0].at("ts"), 0.0);
  EXPECT_DOUBLE_EQ(last.events[0].at("dur"), 1.25);
  EXPECT_DOUBLE_EQ(first.events[0].at("ts"), 0.25);
  EXPECT_DOUBLE_EQ(first.events[0].at("dur"), 0.25);
  EXPECT_DOUBLE_EQ(first.events[1].at("ts"), 2.251);
  EXPECT_EQ(first.events[1].at("dur"), 0.0);
  EXPECT_DOUBLE_EQ(first.events[2].at("dur"), 996.0);

  EXPECT_EQ(first.events[1].at("name"), "mlp \"up\"");
  EXPECT_EQ(first.events[1].at("args").at("layer"), 31);
  EXPECT_EQ(first.events[2].at("args").at("layer"), -1);
}

TEST(ChromeTrace, NamesTheProcess) {
  const Json trace = Json::parse(chrome_trace({}, "bytes that are not UTF-8: \xff"));
  const Json& event = trace.at("traceEvents").at(0);
  EXPECT_EQ(event.at("name"), "process_name");
  EXPECT_THAT(event.at("args").at("name").get<std::string>(),
              testing::StartsWith("bytes that are not UTF-8: "));
}

}  // namespace
}  // namespace clusterfusion::cli
