// clusterfusion score --pairs: continuations after their contexts.
#pragma once

#include <cstdint>
#include <string>

#include "cli/options.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {

// Scores the pairs in `text` (parse_text_pairs()) and prints a line for each; `source` names the
// text in messages. Everything is checked before the first is scored, and nothing is printed before
// the last is. The engine must ask signal_noted(), so that Ctrl-C ends it.
// Errors: malformed, invalid_argument, interrupted.
void score_pairs(Engine& engine, const std::string& text, const std::string& source,
                 std::int32_t num_top, const ReportSettings& report);

}  // namespace clusterfusion::cli
