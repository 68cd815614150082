// What the "decoder" of tokenizer.json does: tokens to text, at once or one by one.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "clusterfusion/model.hpp"
#include "tokenizer/normalizer.hpp"

namespace clusterfusion {

// The steps of a decoder, in the one order that is supported: what is done to each token, bytes,
// and the edges of the whole text.
struct DecoderSpec {
  struct MetaspaceStep {
    std::string replacement;  // becomes a space
    bool drops_first;         // but nothing in the first token
  };
  struct StripStep {
    std::string content;  // one character
    std::size_t start = 0, stop = 0;
  };
  using TokenStep = std::variant<Replace, MetaspaceStep, StripStep>;

  bool is_byte_level = false;  // tokens are spelled in the byte-level alphabet; no other steps
  std::vector<TokenStep> token_steps;
  bool byte_fallback = false;  // "<0x41>" is a byte
  StripStep text_edges;
};

// Immutable.
class Detokenizer {
 public:
  Detokenizer() = default;
  // `bytes`: by id, what each token stands for in byte-level text, otherwise its spelling.
  Detokenizer(const DecoderSpec& spec, std::vector<std::string> bytes);

  // Where a text stands. Begins at its beginning.
  struct State {
    std::string held;              // not yet shown: an unfinished character, or a run of bytes
    std::string edge;              // what Strip may still take from the text's end
    std::size_t num_stripped = 0;  // from its beginning
    bool is_beginning = true;      // Strip may take more there
    bool is_first = true;          // no token has come
  };

  // The text that `token`, an id of the vocabulary, makes certain.
  std::string push(State& state, TokenId token) const;
  // Adds that to `text`; may hold back more, all of it until finish().
  void append(State& state, TokenId token, std::string& text) const {
    if (is_byte_level_) {
      state.held += bytes_[token];
    } else {
      text += push(state, token);
    }
  }
  // What is still held back.
  std::string finish(State& state) const;
  // The bytes of one token within a text.
  std::string_view bytes_of(TokenId token) const { return bytes_[token]; }

 private:
  static constexpr int kNoByte = -1;

  std::string push_piece(State& state, TokenId token) const;
  std::string stripped(State& state, std::string text) const;

  bool is_byte_level_ = true;
  DecoderSpec::StripStep text_edges_;
  std::vector<std::string> bytes_;        // by id
  std::vector<std::string> first_bytes_;  // by id, for the first token; empty if they are the same
  std::vector<bool> is_byte_;             // by id: a byte of byte fallback
};

}  // namespace clusterfusion
