#include "engine/prompt_cache_file.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "backend/backend.hpp"
#include "base/fail.hpp"
#include "base/hash64.hpp"
#include "io/json.hpp"
#include "io/safetensors.hpp"

namespace clusterfusion {
namespace {

constexpr const char* kFormat = "clusterfusion prompt cache 1";
constexpr const char* kAdvice =
    "delete the file, or name another, and the prompt is read and saved anew";
constexpr std::size_t kAlignment = 64;  // of the data in the file

// Of page `index`.
std::uint64_t checksum_of(std::span<const TokenId> tokens, std::size_t index,
                          std::span<const std::byte> page) {
  const auto before = tokens.first((index + 1) * kKvPagePositions);
  return hash64(page, hash64(std::as_bytes(before)));
}

nlohmann::json tensor_entry(const char* dtype, std::vector<std::size_t> shape, std::size_t begin,
                            std::size_t bytes) {
  return {{"dtype", dtype}, {"shape", std::move(shape)}, {"data_offsets", {begin, begin + bytes}}};
}

template <typename T>
void copy_to(std::vector<T>& to, std::span<const std::byte> from) {
  to.resize(from.size() / sizeof(T));
  std::memcpy(to.data(), from.data(), from.size());
}

}  // namespace

void PromptCacheWriter::begin(const PromptCacheIdentity& identity, std::span<const TokenId> tokens,
                              std::int64_t page_bytes) {
  tokens_.assign(tokens.begin(), tokens.end());
  const std::size_t pages = tokens.size() / kKvPagePositions;
  const auto bytes = static_cast<std::size_t>(page_bytes);
  const std::size_t pages_end = tokens.size_bytes() + pages * bytes;
  const nlohmann::json header = {
      {"__metadata__",
       {{"format", kFormat},
        {"model", identity.model},
        {"model_name", identity.model_name},
        {"kv_dtype", identity.kv_dtype},
        {"arithmetic", identity.arithmetic},
        {"version", identity.version}}},
      {"tokens", tensor_entry("I32", {tokens.size()}, 0, tokens.size_bytes())},
      {"pages", tensor_entry("U8", {pages, bytes}, tokens.size_bytes(), pages * bytes)},
      {"page_checksums", tensor_entry("U64", {pages}, pages_end, pages * sizeof(std::uint64_t))}};
  // A folder's name may be no UTF-8.
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const std::uint64_t unaligned = sizeof(std::uint64_t) + text.size();
  text.append((kAlignment - unaligned % kAlignment) % kAlignment, ' ');
  const std::uint64_t size = text.size();
  file_.write(std::as_bytes(std::span(&size, 1)));
  file_.write(std::as_bytes(std::span(text)));
  file_.write(std::as_bytes(tokens));
}

void PromptCacheWriter::add_page(std::span<const std::byte> page) {
  checksums_.push_back(checksum_of(tokens_, checksums_.size(), page));
  file_.write(page);
}

void PromptCacheWriter::commit() {
  file_.write(std::as_bytes(std::span(checksums_)));
  file_.commit();
}

PromptCacheReader::PromptCacheReader(const std::filesystem::path& path)
    : file_(path),
      name_(quote(path.string())),
      metadata_(safetensors_metadata(file_.bytes(), name_)) {
  require(metadata("format") == kFormat, ErrorKind::malformed,
          "{}: expected a prompt that was saved with --prompt-cache (format {}), found format {}; "
          "name another file",
          name_, quote(kFormat), quote(metadata("format")));
}

std::string PromptCacheReader::metadata(const char* key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? std::string() : found->second;
}

void PromptCacheReader::expect(const PromptCacheIdentity& own, std::int64_t page_bytes) {
  require(metadata("model") == own.model, ErrorKind::invalid_argument,
          "{}: expected keys and values of the model in {} (fingerprint of shape and weights {}), "
          "found those of {} ({}); {}",
          name_, own.model_name, own.model, metadata("model_name"), metadata("model"), kAdvice);
  const auto compare = [&](const char* key, const char* what, const std::string& expected) {
    require(metadata(key) == expected, ErrorKind::invalid_argument,
            "{}: expected keys and values of {} {}, as this engine's are, found {}; {}", name_,
            what, quote(expected), quote(metadata(key)), kAdvice);
  };
  compare("kv_dtype", "type", own.kv_dtype);
  compare("arithmetic", "device and mode", own.arithmetic);
  compare("version", "version", own.version);
  page_.resize(static_cast<std::size_t>(page_bytes));
  find_tensors();
}

void PromptCacheReader::find_tensors() {
  const std::vector<TensorEntry> entries = parse_safetensors(file_.bytes(), name_);
  const auto find = [&](const char* name, const char* dtype,
                        std::vector<std::int64_t> shape) -> const TensorEntry& {
    const auto at = std::ranges::find(entries, name, &TensorEntry::name);
    require(at != entries.end() && at->dtype == dtype && (shape.empty() || at->shape == shape),
            ErrorKind::malformed, "{}: it has no tensor \"{}\" of the right size; {}", name_, name,
            kAdvice);
    return *at;
  };
  const TensorEntry& tokens = find("tokens", "I32", {});
  const std::int64_t pages =
      static_cast<std::int64_t>(tokens.end - tokens.begin) / 4 / kKvPagePositions;
  require(tokens.shape == std::vector{pages * kKvPagePositions}, ErrorKind::malformed,
          "{}: expected the tokens of whole pages of {}; {}", name_, kKvPagePositions, kAdvice);
  pages_begin_ = find("pages", "U8", {pages, std::ssize(page_)}).begin;
  const TensorEntry& checksums = find("page_checksums", "U64", {pages});
  copy_to(tokens_, file_.bytes().subspan(tokens.begin, tokens.end - tokens.begin));
  copy_to(checksums_, file_.bytes().subspan(checksums.begin, checksums.end - checksums.begin));
}

std::span<const std::byte> PromptCacheReader::page(std::int64_t index) {
  const auto number = static_cast<std::size_t>(index);
  const auto bytes = file_.bytes().subspan(pages_begin_ + number * page_.size(), page_.size());
  std::ranges::copy(bytes, page_.begin());
  require(!file_.has_lost_pages(), ErrorKind::io,
          "{}: it became shorter, or could not be read, while it was being loaded; {}", name_,
          kAdvice);
  require(checksum_of(tokens_, number, page_) == checksums_[number], ErrorKind::malformed,
          "{}: damaged: page {} of {} or its tokens are not what was saved (their checksum "
          "differs); {}",
          name_, index, num_pages(), kAdvice);
  return page_;
}

}  // namespace clusterfusion
