// A timeline in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open:
// "Trace Event Format", Google,
// https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
#pragma once

#include <span>
#include <string>

#include "clusterfusion/timeline.hpp"

namespace clusterfusion::cli {

// One JSON document: a row for each SM, an "X" event with name, ts, dur (microseconds from the
// first event on) and args.layer for each of `events`. `title` names the process.
std::string chrome_trace(std::span<const TimelineEvent> events, const std::string& title);

}  // namespace clusterfusion::cli
