// BPE as Hugging Face `tokenizers` computes it, read from tokenizer.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// Immutable after opening; every const function may be called from several threads.
class Tokenizer {
 public:
  // Opens a tokenizer.json, or the one in the folder `path`, which may be a name on the hub, then
  // with a `revision`: find_checkpoint() in hub.hpp.
  // Supported: model BPE, byte-level (GPT-NeoX, Llama 3, Qwen) or of characters with byte fallback
  // (Llama 2, Mistral); normalizers NFC, NFKC, Prepend, Replace and Strip; pre-tokenizers
  // ByteLevel, Split, Metaspace, Digits, Punctuation and WhitespaceSplit; decoders ByteLevel, or
  // Replace, Metaspace, ByteFallback, Fuse and Strip in this order; sequences of them; merges as "a
  // b" strings or ["a", "b"] pairs; added tokens with all their flags; ByteLevel or
  // TemplateProcessing post-processors. Anything else is refused by name, but for "truncation" and
  // "padding", which are ignored as transformers does. Where a folder is opened, warnings() tells
  // what the files beside tokenizer.json ask for and do not get. Errors: not_found,
  // permission_denied, io, malformed, unsupported; those of find_checkpoint().
  static std::shared_ptr<const Tokenizer> open(const std::filesystem::path& path,
                                               const std::string& revision = "");
  // The same from the text of a tokenizer.json; `name` stands for the file in messages.
  static std::shared_ptr<const Tokenizer> parse(std::string_view json, const std::string& name);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Text (UTF-8) to token ids. Each maximal ill-formed subsequence of bytes is read as U+FFFD, as
  // Python's bytes.decode("utf-8", errors="replace") does. With `add_special_tokens` the
  // post-processor's tokens are added, as in tokenizers' encode(); added tokens that stand in the
  // text are always recognised. Errors: invalid_argument for more than 2^31 - 1 bytes; unsupported
  // if a regular expression of the file takes too long for the text.
  std::vector<TokenId> encode(std::string_view text, bool add_special_tokens = true) const;

  // Token ids to text. Bytes that do not form UTF-8 become U+FFFD, and ids behind the vocabulary
  // (a model's may be padded) nothing, as in tokenizers' decode().
  // Errors: out_of_range for a negative id (names index and id).
  std::string decode(std::span<const TokenId> tokens, bool skip_special_tokens = true) const;

  // What tokenizer_config.json, special_tokens_map.json and added_tokens.json ask for that
  // tokenizer.json does not: ids may differ from those of transformers' AutoTokenizer.
  const std::vector<std::string>& warnings() const noexcept;

  // One past the largest id of vocabulary and added tokens.
  std::int64_t vocab_size() const noexcept;
  // The id of a token as tokenizer.json spells it ("Ġthe", "▁the"), added tokens included.
  std::optional<TokenId> token_to_id(std::string_view token) const;
  // The token as tokenizer.json spells it. Errors: out_of_range.
  std::string_view id_to_token(TokenId token) const;
  // How many tokens encode() puts before those of the text, with `add_special_tokens`.
  std::size_t num_leading_tokens() const noexcept;
  // Whether decode() leaves the token out with `skip_special_tokens`.
  bool is_special(TokenId token) const noexcept;
  // The bytes that decode() gives for a token within a text: for an added token its content
  // (normalized if it is matched so), unless merges make it out of text as well. Errors:
  // out_of_range.
  std::string_view bytes_of(TokenId token) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

// Turns a stream of tokens into a stream of well-formed UTF-8: what a later token may change is
// held back, such as bytes of an unfinished character (U+FFFD if it turns out to be broken). The
// concatenation of all pieces and of finish() equals Tokenizer::decode() of all tokens.
class StreamDecoder {
 public:
  // continues: text stands before the first token, so that a space which decode() leaves out at the
  // beginning of a text (Llama 2's) is kept.
  explicit StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer,
                         bool skip_special_tokens = true, bool continues = false);
  StreamDecoder(const StreamDecoder& other);
  StreamDecoder& operator=(const StreamDecoder& other) { return *this = StreamDecoder(other); }
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;
  ~StreamDecoder();

  // The text that `token` makes certain; may be empty. Errors: out_of_range for a negative id.
  std::string push(TokenId token);
  // What is still held back. Nothing may be pushed afterwards.
  std::string finish();

 private:
  struct State;
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_tokens_;
  std::unique_ptr<State> state_;
};

}  // namespace clusterfusion
