#include "clusterfusion/tokenizer.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "base/fail.hpp"
#include "clusterfusion/hub.hpp"
#include "io/json.hpp"
#include "io/mapped_file.hpp"
#include "tokenizer/added_tokens.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/byte_alphabet.hpp"
#include "tokenizer/detokenizer.hpp"
#include "tokenizer/neighbour_files.hpp"
#include "tokenizer/normalizer.hpp"
#include "tokenizer/pre_tokenizer.hpp"
#include "tokenizer/tokenizer_file.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxTokenizerBytes = std::size_t{1} << 30;
constexpr std::size_t kMaxTextBytes = std::numeric_limits<std::int32_t>::max();

// What the merges can work with: in a byte-level model, tokens that are spelled in its alphabet.
std::vector<std::string> model_token_bytes(const TokenizerFile& file) {
  std::vector<std::string> bytes(file.model_vocabulary_size);
  for (std::size_t id = 0; id < bytes.size(); ++id) {
    const std::string& spelled = file.vocabulary[id];
    bytes[id] = file.is_byte_level() ? unspell_bytes(spelled).value_or("") : spelled;
  }
  return bytes;
}

// Tokens of the model's vocabulary that it can make out of text; the others come from added tokens
// alone.
std::vector<bool> tokens_from_text(const TokenizerFile& file) {
  std::vector<bool> is_made(file.model_vocabulary_size);
  for (const Merge& merge : file.merges) is_made[merge.result] = true;
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = file.ids.find(spell_byte(static_cast<unsigned char>(byte)));
    if (id && static_cast<std::size_t>(*id) < is_made.size()) is_made[*id] = true;
  }
  if (!file.ignore_merges) return is_made;
  const std::vector<std::string> words = model_token_bytes(file);
  for (std::size_t id = 0; id < words.size(); ++id) {
    if (!words[id].empty() && is_valid_utf8(words[id])) is_made[id] = true;
  }
  return is_made;
}

// The form in which an added token is looked for in text.
std::string form_in_text(const AddedToken& token, const std::vector<NormalizerStep>& normalizer) {
  if (!token.normalized) return token.content;
  return normalize(normalizer, token.content).value_or(token.content);
}

// What each token is to the decoder, added tokens in the form in which they stand in text.
std::vector<std::string> decoder_bytes(const TokenizerFile& file) {
  std::vector<std::string> bytes;
  for (const std::string& spelled : file.vocabulary) {
    bytes.push_back(file.is_byte_level() ? unspell_bytes(spelled).value_or(spelled) : spelled);
  }
  const std::vector<bool> is_made = tokens_from_text(file);
  for (const AddedToken& token : file.added_tokens) {
    // It stands for the text in which it is found, also where all of its characters are of the
    // byte-level alphabet, as in "café". (tokenizers reads these as bytes and gives back other
    // text.) Where it is found in words as well, that is spelled bytes.
    const auto id = static_cast<std::size_t>(token.id);
    bytes[id] = form_in_text(token, file.normalizer);
    if (!file.is_byte_level() || id >= is_made.size() || !is_made[id]) continue;
    if (auto spelled = unspell_bytes(bytes[id])) bytes[id] = std::move(*spelled);
  }
  return bytes;
}

}  // namespace

struct Tokenizer::Impl {
  Impl(std::string_view json, const std::string& name)
      : name(name),
        file(read_tokenizer_file(json, name)),
        bpe(model_token_bytes(*file), file->merges, file->ignore_merges, file->characters),
        detokenizer(file->decoder, decoder_bytes(*file)),
        skipped(file->vocabulary.size()) {
    add_tokens();
  }

  void add_tokens();
  void check_id(TokenId token, const std::string& where) const;
  void encode_raw(std::string_view text, std::vector<TokenId>& out) const;
  void encode_normalized(std::string_view text, bool is_first, std::vector<TokenId>& out) const;

  std::string name;
  std::unique_ptr<const TokenizerFile> file;
  Bpe bpe;
  AddedTokenMatcher raw_tokens;         // looked for before normalization
  AddedTokenMatcher normalized_tokens;  // and after it
  Detokenizer detokenizer;
  std::vector<bool> skipped;  // by id: left out with skip_special_tokens
  std::vector<std::string> warnings;
};

void Tokenizer::Impl::add_tokens() {
  std::vector<AddedTokenMatcher::Pattern> raw, normalized;
  std::vector<std::string> special;
  for (const AddedToken& token : file->added_tokens) {
    if (token.special) special.push_back(token.content);
    std::vector<AddedTokenMatcher::Pattern>& patterns = token.normalized ? normalized : raw;
    patterns.push_back({form_in_text(token, file->normalizer), token});
    require(!patterns.back().text.empty(), ErrorKind::unsupported,
            "{}: \"added_tokens\": the \"normalizer\" leaves nothing of {}, which is not supported",
            name, quote(token.content));
  }
  std::sort(special.begin(), special.end());
  for (const auto* patterns : {&raw, &normalized}) {
    for (const AddedTokenMatcher::Pattern& pattern : *patterns) {
      // By text, not by the flag: so does tokenizers, and a normalized form may be another text.
      skipped[pattern.token.id] = std::binary_search(special.begin(), special.end(), pattern.text);
    }
  }
  const auto by_text = [](const auto& left, const auto& right) { return left.text < right.text; };
  const auto same_text = [](const auto& left, const auto& right) {
    return left.text == right.text;
  };
  std::sort(normalized.begin(), normalized.end(), by_text);
  const auto twice = std::adjacent_find(normalized.begin(), normalized.end(), same_text);
  if (twice != normalized.end()) {
    fail(ErrorKind::malformed,
         "{}: \"added_tokens\": {} and {} are the same text in NFC; expected different ones", name,
         quote(twice->token.content), quote(std::next(twice)->token.content));
  }
  raw_tokens = AddedTokenMatcher(std::move(raw));
  normalized_tokens = AddedTokenMatcher(std::move(normalized));
}

void Tokenizer::Impl::check_id(TokenId token, const std::string& where) const {
  const auto size = static_cast<std::int64_t>(file->vocabulary.size());
  require(token >= 0 && token < size, ErrorKind::out_of_range,
          "{}: {} must be an id from 0 to {}, found {}", name, where, size - 1, token);
}

void Tokenizer::Impl::encode_raw(std::string_view text, std::vector<TokenId>& out) const {
  raw_tokens.split(
      text,
      [&](std::string_view piece) {
        const bool is_first = piece.data() == text.data();
        if (const auto normalized = normalize(file->normalizer, piece)) {
          encode_normalized(*normalized, is_first, out);
        } else {
          encode_normalized(piece, is_first, out);
        }
      },
      [&](TokenId token) { out.push_back(token); });
}

void Tokenizer::Impl::encode_normalized(std::string_view text, bool is_first,
                                        std::vector<TokenId>& out) const {
  normalized_tokens.split(
      text,
      [&](std::string_view piece) {
        file->pre_tokenizer.split(piece, is_first && piece.data() == text.data(),
                                  [&](std::string_view word) { bpe.encode(word, out); });
      },
      [&](TokenId token) { out.push_back(token); });
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

std::shared_ptr<const Tokenizer> Tokenizer::open(const std::filesystem::path& name,
                                                 const std::string& revision) {
  const std::filesystem::path path = find_checkpoint(name, revision, CheckpointFiles::tokenizer);
  const bool is_folder = std::filesystem::is_directory(path);
  const std::filesystem::path file = is_folder ? path / "tokenizer.json" : path;
  if (is_folder && !is_there(file)) fail_no_tokenizer(path);
  auto impl = std::make_unique<Impl>(read_file(file, kMaxTokenizerBytes), file.string());
  if (is_folder) impl->warnings = unmet_settings(path, *impl->file);
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
}

std::shared_ptr<const Tokenizer> Tokenizer::parse(std::string_view json, const std::string& name) {
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::make_unique<const Impl>(json, name)));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  require(text.size() <= kMaxTextBytes, ErrorKind::invalid_argument,
          "{}: encode() takes at most {} bytes of text, found {}; encode it in parts", impl_->name,
          kMaxTextBytes, text.size());
  std::vector<TokenId> tokens;
  if (is_valid_utf8(text)) {
    impl_->encode_raw(text, tokens);
  } else {
    std::string repaired;
    append_repaired(text, true, repaired);
    impl_->encode_raw(repaired, tokens);
  }
  if (impl_->file->post_processing.empty()) return tokens;

  std::vector<TokenId> processed;
  for (const TemplatePiece& piece : impl_->file->post_processing) {
    if (!piece.is_text && !add_special_tokens) continue;
    const std::vector<TokenId>& part = piece.is_text ? tokens : piece.special_tokens;
    processed.insert(processed.end(), part.begin(), part.end());
  }
  return processed;
}

std::string Tokenizer::decode(std::span<const TokenId> tokens, bool skip_special_tokens) const {
  Detokenizer::State state;
  std::string text;
  for (std::size_t index = 0; index < tokens.size(); ++index) {
    const TokenId token = tokens[index];
    require(token >= 0, ErrorKind::out_of_range,
            "{}: decode() token at index {} must be an id of at least 0, found {}", impl_->name,
            index, token);
    if (token >= vocab_size() || (skip_special_tokens && impl_->skipped[token])) continue;
    impl_->detokenizer.append(state, token, text);
  }
  return text + impl_->detokenizer.finish(state);
}

const std::vector<std::string>& Tokenizer::warnings() const noexcept { return impl_->warnings; }

std::int64_t Tokenizer::vocab_size() const noexcept {
  return static_cast<std::int64_t>(impl_->file->vocabulary.size());
}

std::optional<TokenId> Tokenizer::token_to_id(std::string_view token) const {
  return impl_->file->ids.find(token);
}

std::string_view Tokenizer::id_to_token(TokenId token) const {
  impl_->check_id(token, "token");
  return impl_->file->vocabulary[token];
}

std::size_t Tokenizer::num_leading_tokens() const noexcept {
  std::size_t count = 0;
  for (const TemplatePiece& piece : impl_->file->post_processing) {
    if (piece.is_text) return count;
    count += piece.special_tokens.size();
  }
  return count;
}

bool Tokenizer::is_special(TokenId token) const noexcept {
  return token >= 0 && token < vocab_size() && impl_->skipped[token];
}

std::string_view Tokenizer::bytes_of(TokenId token) const {
  impl_->check_id(token, "token");
  return impl_->detokenizer.bytes_of(token);
}

struct StreamDecoder::State : Detokenizer::State {};

StreamDecoder::StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens,
                             bool continues)
    : tokenizer_(std::move(tokenizer)),
      skip_special_tokens_(skip_special_tokens),
      state_(std::make_unique<State>()) {
  if (continues) state_->is_first = state_->is_beginning = false;
}

StreamDecoder::StreamDecoder(const StreamDecoder& other)
    : tokenizer_(other.tokenizer_),
      skip_special_tokens_(other.skip_special_tokens_),
      state_(std::make_unique<State>(*other.state_)) {}

StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;
StreamDecoder::~StreamDecoder() = default;

std::string StreamDecoder::push(TokenId token) {
  if (token >= tokenizer_->vocab_size()) return {};
  tokenizer_->impl_->check_id(token, "token");
  if (skip_special_tokens_ && tokenizer_->is_special(token)) return {};
  return tokenizer_->impl_->detokenizer.push(*state_, token);
}

std::string StreamDecoder::finish() { return tokenizer_->impl_->detokenizer.finish(*state_); }

}  // namespace clusterfusion
