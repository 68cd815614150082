// What a tokenizer.json says, checked and reduced to what byte-level BPE needs.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/string_table.hpp"

namespace clusterfusion {

// One piece of a TemplateProcessing post-processor: the text's tokens, or special tokens.
struct TemplatePiece {
  bool is_text = false;
  std::vector<TokenId> special_tokens;
};

struct TokenizerFile {
  TokenizerFile() = default;
  TokenizerFile(const TokenizerFile&) = delete;
  TokenizerFile& operator=(const TokenizerFile&) = delete;

  std::vector<std::string> vocabulary;  // by id, spelled as in the file; added tokens last
  StringTable ids{vocabulary};
  std::size_t model_vocabulary_size = 0;  // how many of them the model knows
  std::vector<Merge> merges;
  bool ignore_merges = false;
  bool normalize_nfc = false;
  bool add_prefix_space = false;
  bool split_words = true;  // "use_regex"
  std::vector<AddedToken> added_tokens;
  std::vector<TemplatePiece> post_processing;  // empty: the text's tokens alone
};

// Reads the text of a tokenizer.json; `name` stands for the file in messages.
// Errors: malformed, unsupported.
std::unique_ptr<const TokenizerFile> read_tokenizer_file(std::string_view json,
                                                         const std::string& name);

}  // namespace clusterfusion
