// A tokenizer of a dozen tokens, as JSON that tests may change.
#pragma once

#include <nlohmann/json.hpp>

namespace clusterfusion {

// Ids: 0 "a", 1 "b", 2 "c", 3 " ", 4 and 5 the two bytes of "é" and 6 the whole, 7 "ab", 8 " ab",
// 9 "<eos>" (added, special), 10 "<x>" (added).
inline nlohmann::json small_tokenizer() {
  const nlohmann::json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  const auto added = [](int id, const char* content, bool special) -> nlohmann::json {
    return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
            {"rstrip", false}, {"normalized", false}, {"special", special}};
  };
  const nlohmann::json vocab = {{"a", 0}, {"b", 1},  {"c", 2},  {"Ġ", 3},  {"Ã", 4},
                                {"©", 5}, {"Ã©", 6}, {"ab", 7}, {"Ġab", 8}};
  return {{"version", "1.0"},
          {"added_tokens", {added(9, "<eos>", true), added(10, "<x>", false)}},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer", byte_level},
          {"post_processor", byte_level},
          {"decoder", byte_level},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", "Ġ ab", "Ã ©"}}}}};
}

}  // namespace clusterfusion
