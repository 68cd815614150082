// What a tokenizer.json says, checked.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/detokenizer.hpp"
#include "tokenizer/normalizer.hpp"
#include "tokenizer/pre_tokenizer.hpp"
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
  std::optional<CharacterTokens> characters;  // of a model that is not byte-level
  std::vector<NormalizerStep> normalizer;
  PreTokenizer pre_tokenizer;
  DecoderSpec decoder;
  std::vector<AddedToken> added_tokens;
  std::vector<TemplatePiece> post_processing;  // empty: the text's tokens alone

  bool is_byte_level() const noexcept { return pre_tokenizer.is_byte_level(); }
  // Whether a space, however it is spelled, is put before a text.
  bool adds_prefix_space() const noexcept;
};

// Reads the text of a tokenizer.json; `name` stands for the file in messages.
// Errors: malformed, unsupported.
std::unique_ptr<const TokenizerFile> read_tokenizer_file(std::string_view json,
                                                         const std::string& name);

}  // namespace clusterfusion
