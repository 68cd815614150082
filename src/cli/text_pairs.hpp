// Pairs of texts from a file of JSON lines.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace clusterfusion::cli {

struct TextPair {
  std::string context;
  std::string continuation;
  std::string where;  // for messages: "pairs.jsonl":3
};

// One pair from each line {"context": "...", "continuation": "..."}; other keys and empty lines are
// passed over. `source` names the text in messages.
// Errors: malformed, with the line's number; invalid_argument if there is no pair.
std::vector<TextPair> parse_text_pairs(std::string_view text, const std::string& source);

}  // namespace clusterfusion::cli
