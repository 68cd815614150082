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
#include "tokenizer/neighbour_files.hpp"
#include "tokenizer/nfc.hpp"
#include "tokenizer/tokenizer_file.hpp"
#include "tokenizer/utf8.hpp"
#include "tokenizer/word_splitter.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;
constexpr std::size_t kMaxTextBytes = std::numeric_limits<std::int32_t>::max();

// Tokens of the model's vocabulary that its merges can make out of text; the others come from added
// tokens alone.
std::vector<bool> tokens_from_merges(const TokenizerFile& file) {
  std::vector<bool> is_made(file.model_vocabulary_size, file.ignore_merges);
  for (const Merge& merge : file.merges) is_made[merge.result] = true;
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = file.ids.find(spell_byte(static_cast<unsigned char>(byte)));
    if (id && static_cast<std::size_t>(*id) < is_made.size()) is_made[*id] = true;
  }
  return is_made;
}

// What the merges can work with: tokens that are spelled in the byte-level alphabet.
std::vector<std::string> model_token_bytes(const TokenizerFile& file) {
  std::vector<std::string> bytes(file.model_vocabulary_size);
  for (std::size_t id = 0; id < bytes.size(); ++id) {
    bytes[id] = unspell_bytes(file.vocabulary[id]).value_or("");
  }
  return bytes;
}

// The form in which an added token is looked for in text.
std::string form_in_text(const AddedToken& token, bool normalize_nfc) {
  if (!token.normalized || !normalize_nfc) return token.content;
  return to_nfc(token.content).value_or(token.content);
}

}  // namespace

struct Tokenizer::Impl {
  Impl(std::string_view json, const std::string& name)
      : name(name),
        file(read_tokenizer_file(json, name)),
        bpe(model_token_bytes(*file), file->merges, file->ignore_merges) {
    for (const std::string& spelled : file->vocabulary) {
      bytes.push_back(unspell_bytes(spelled).value_or(spelled));
    }
    skipped.resize(bytes.size());
    add_tokens();
  }

  void add_tokens();
  void check_id(TokenId token, const std::string& where) const;
  void encode_raw(std::string_view text, std::vector<TokenId>& out) const;
  void encode_normalized(std::string_view text, std::vector<TokenId>& out) const;
  void encode_words(std::string_view text, std::vector<TokenId>& out) const;

  std::string name;
  std::unique_ptr<const TokenizerFile> file;
  Bpe bpe;
  AddedTokenMatcher raw_tokens;         // looked for before normalization
  AddedTokenMatcher normalized_tokens;  // and after it
  std::vector<std::string> bytes;       // by id: what decoding gives
  std::vector<bool> skipped;            // by id: left out with skip_special_tokens
  std::vector<std::string> warnings;
};

void Tokenizer::Impl::add_tokens() {
  const std::vector<bool> is_made = tokens_from_merges(*file);
  std::vector<AddedTokenMatcher::Pattern> raw, normalized;
  std::vector<std::string> special;
  for (const AddedToken& token : file->added_tokens) {
    if (token.special) special.push_back(token.content);
    const std::string form = form_in_text(token, file->normalize_nfc);
    std::vector<AddedTokenMatcher::Pattern>& patterns = token.normalized ? normalized : raw;
    patterns.push_back({form, token});
    // It stands for the text in which it is found, also where all of its characters are of the
    // byte-level alphabet, as in "café". (tokenizers reads these as bytes and gives back other
    // text.)
    const auto id = static_cast<std::size_t>(token.id);
    if (id >= is_made.size() || !is_made[id]) bytes[token.id] = form;
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
  const auto size = static_cast<std::int64_t>(bytes.size());
  require(token >= 0 && token < size, ErrorKind::out_of_range,
          "{}: {} must be an id from 0 to {}, found {}", name, where, size - 1, token);
}

void Tokenizer::Impl::encode_raw(std::string_view text, std::vector<TokenId>& out) const {
  raw_tokens.split(
      text,
      [&](std::string_view piece) {
        if (const auto normalized = file->normalize_nfc ? to_nfc(piece) : std::nullopt) {
          encode_normalized(*normalized, out);
        } else {
          encode_normalized(piece, out);
        }
      },
      [&](TokenId token) { out.push_back(token); });
}

void Tokenizer::Impl::encode_normalized(std::string_view text, std::vector<TokenId>& out) const {
  normalized_tokens.split(
      text,
      [&](std::string_view piece) {
        if (file->add_prefix_space && piece[0] != ' ') {
          encode_words(std::string(1, ' ').append(piece), out);
        } else {
          encode_words(piece, out);
        }
      },
      [&](TokenId token) { out.push_back(token); });
}

void Tokenizer::Impl::encode_words(std::string_view text, std::vector<TokenId>& out) const {
  if (!file->split_words) {
    bpe.encode(text, out);
    return;
  }
  WordSplitter words(text);
  for (std::string_view word = words.next(); !word.empty(); word = words.next()) {
    bpe.encode(word, out);
  }
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

std::shared_ptr<const Tokenizer> Tokenizer::open(const std::filesystem::path& name,
                                                 const std::string& revision) {
  const std::filesystem::path path = find_checkpoint(name, revision, CheckpointFiles::tokenizer);
  const bool is_folder = std::filesystem::is_directory(path);
  const std::filesystem::path file = is_folder ? path / "tokenizer.json" : path;
  if (is_folder && !is_there(file)) fail_no_tokenizer(path);
  auto impl = std::make_unique<Impl>(read_file(file, kMaxFileBytes), file.string());
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
  std::string bytes;
  for (std::size_t index = 0; index < tokens.size(); ++index) {
    const TokenId token = tokens[index];
    require(token >= 0, ErrorKind::out_of_range,
            "{}: decode() token at index {} must be an id of at least 0, found {}", impl_->name,
            index, token);
    if (token >= vocab_size()) continue;
    if (!skip_special_tokens || !impl_->skipped[token]) bytes += impl_->bytes[token];
  }
  std::string text;
  append_repaired(bytes, true, text);
  return text;
}

const std::vector<std::string>& Tokenizer::warnings() const noexcept { return impl_->warnings; }

std::int64_t Tokenizer::vocab_size() const noexcept {
  return static_cast<std::int64_t>(impl_->bytes.size());
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
  return impl_->bytes[token];
}

StreamDecoder::StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(TokenId token) {
  if (token >= tokenizer_->vocab_size()) return {};
  const std::string_view bytes = tokenizer_->bytes_of(token);
  if (skip_special_tokens_ && tokenizer_->is_special(token)) return {};
  pending_ += bytes;
  std::string text;
  pending_.erase(0, append_repaired(pending_, false, text));
  return text;
}

std::string StreamDecoder::finish() {
  std::string text;
  append_repaired(pending_, true, text);
  pending_.clear();
  return text;
}

}  // namespace clusterfusion
