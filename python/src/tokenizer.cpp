#include "clusterfusion/tokenizer.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "base/fail.hpp"
#include "convert.hpp"
#include "export.hpp"
#include "objects.hpp"

namespace clusterfusion::python {
namespace {

TokenizerRef tokenizer_open(ffi::String path) {
  return TokenizerRef(ffi::make_object<TokenizerObj>(Tokenizer::open(std::string(path))));
}

ffi::Array<ffi::String> tokenizer_warnings(TokenizerRef tokenizer) {
  ffi::Array<ffi::String> warnings;
  for (const std::string& warning : tokenizer->tokenizer->warnings()) warnings.push_back(warning);
  return warnings;
}

ffi::Tensor tokenizer_encode(TokenizerRef tokenizer, ffi::Bytes text, bool add_special_tokens) {
  return to_tensor(tokenizer->tokenizer->encode(view_of(text), add_special_tokens));
}

// Text i is text[ends[i - 1], ends[i]). Returns all ids one after the other, and where each text's
// ids end: one call and two arrays, however many texts there are.
ffi::Array<ffi::Tensor> tokenizer_encode_batch(TokenizerRef tokenizer, ffi::Bytes text,
                                               ffi::TensorView ends, bool add_special_tokens) {
  const std::string_view all = view_of(text);
  std::vector<TokenId> ids;
  std::vector<std::int64_t> id_ends;
  id_ends.reserve(static_cast<std::size_t>(ends.size(0)));
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < ends.size(0); ++i) {
    const std::int64_t end = static_cast<const std::int64_t*>(ends.data_ptr())[i];
    const auto one = tokenizer->tokenizer->encode(
        all.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)),
        add_special_tokens);
    ids.insert(ids.end(), one.begin(), one.end());
    id_ends.push_back(static_cast<std::int64_t>(ids.size()));
    begin = end;
  }
  return {to_tensor(std::move(ids)), to_tensor(std::move(id_ends))};
}

ffi::String tokenizer_decode(TokenizerRef tokenizer, ffi::TensorView tokens,
                             bool skip_special_tokens) {
  return tokenizer->tokenizer->decode(tokens_of(tokens), skip_special_tokens);
}

std::int64_t tokenizer_vocab_size(TokenizerRef tokenizer) {
  return tokenizer->tokenizer->vocab_size();
}

ffi::Any tokenizer_token_to_id(TokenizerRef tokenizer, ffi::Bytes token) {
  const auto id = tokenizer->tokenizer->token_to_id(view_of(token));
  return id ? ffi::Any(*id) : ffi::Any();
}

ffi::String tokenizer_id_to_token(TokenizerRef tokenizer, std::int64_t token) {
  return ffi::String(std::string(tokenizer->tokenizer->id_to_token(static_cast<TokenId>(token))));
}

// The bytes that decode() gives for a token.
ffi::Bytes tokenizer_token_bytes(TokenizerRef tokenizer, std::int64_t token) {
  const std::string_view bytes = tokenizer->tokenizer->bytes_of(static_cast<TokenId>(token));
  return ffi::Bytes(bytes.data(), bytes.size());
}

CLUSTERFUSION_EXPORT(tokenizer_open)
CLUSTERFUSION_EXPORT(tokenizer_warnings)
CLUSTERFUSION_EXPORT(tokenizer_encode)
CLUSTERFUSION_EXPORT(tokenizer_encode_batch)
CLUSTERFUSION_EXPORT(tokenizer_decode)
CLUSTERFUSION_EXPORT(tokenizer_vocab_size)
CLUSTERFUSION_EXPORT(tokenizer_token_to_id)
CLUSTERFUSION_EXPORT(tokenizer_id_to_token)
CLUSTERFUSION_EXPORT(tokenizer_token_bytes)

}  // namespace
}  // namespace clusterfusion::python
