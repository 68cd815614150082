// Whatever text tokenizer.json holds: it is refused with an Error, or it gives a tokenizer that
// keeps its promises on any text. The input is the JSON; a text to encode may follow a zero byte.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/error.hpp"
#include "clusterfusion/tokenizer.hpp"
#include "tokenizer/utf8.hpp"

namespace {

using clusterfusion::StreamDecoder;
using clusterfusion::TokenId;
using clusterfusion::Tokenizer;

void check(bool condition) {
  if (!condition) std::abort();
}

std::string stream(const std::shared_ptr<const Tokenizer>& tokenizer,
                   const std::vector<TokenId>& tokens) {
  StreamDecoder decoder(tokenizer);
  std::string text;
  for (const TokenId token : tokens) {
    const std::string piece = decoder.push(token);
    check(clusterfusion::is_valid_utf8(piece));
    text += piece;
  }
  return text + decoder.finish();
}

void check_tokenizer(const std::shared_ptr<const Tokenizer>& tokenizer, std::string_view text) {
  check(tokenizer->vocab_size() > 0);
  for (const bool special : {true, false}) {
    const std::vector<TokenId> tokens = tokenizer->encode(text, special);
    for (const TokenId token : tokens) {
      check(token >= 0 && token < tokenizer->vocab_size());
      check(tokenizer->token_to_id(tokenizer->id_to_token(token)) == token);
    }
    const std::string decoded = tokenizer->decode(tokens);
    check(clusterfusion::is_valid_utf8(decoded));
    check(stream(tokenizer, tokens) == decoded);
  }
}

std::shared_ptr<const Tokenizer> parse(std::string_view json) {
  try {
    return Tokenizer::parse(json, "fuzz");
  } catch (const clusterfusion::Error& error) {
    const std::string message = error.what();
    check(message.starts_with("fuzz"));
    check(clusterfusion::is_valid_utf8(message));
    check(error.kind() == clusterfusion::ErrorKind::malformed ||
          error.kind() == clusterfusion::ErrorKind::unsupported);
    return nullptr;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = input.find('\0');
  const std::string_view json = input.substr(0, end);
  const std::string_view text = end == input.npos ? json : input.substr(end + 1);
  const auto tokenizer = parse(json);
  if (!tokenizer) return 0;
  try {
    check_tokenizer(tokenizer, text);
  } catch (const clusterfusion::Error& error) {
    // A regular expression of the file that would not end.
    check(error.kind() == clusterfusion::ErrorKind::unsupported);
    check(std::string_view(error.what()).find("takes too long") != std::string_view::npos);
  }
  return 0;
}
