// Keys and values of the beginning of a prompt in a file.
//
// A file in the safetensors format, so that others can look into it:
//   __metadata__     "format", and what PromptCacheIdentity says
//   tokens           I32 [64 pages]: of the positions in the pages
//   pages            U8 [pages, page_bytes]: as the backend has them in memory
//   page_checksums   U64 [pages]: XXH64 of a page, whose seed is that of all tokens up to its end
//                    (seed 0)
// It is written under another name and renamed when it is whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/model.hpp"
#include "io/mapped_file.hpp"
#include "io/new_file.hpp"

namespace clusterfusion {

// What the bits of keys and values depend on, besides the tokens.
struct PromptCacheIdentity {
  std::string model;       // fingerprint_of()
  std::string model_name;  // its folder, for messages: not compared
  std::string kv_dtype;
  std::string arithmetic;  // BackendInfo's: device and mode
  std::string version;     // of this library
};

// Errors: those of NewFile.
class PromptCacheWriter {
 public:
  explicit PromptCacheWriter(const std::filesystem::path& path) : file_(path) {}

  // First, and once; `tokens` fill whole pages.
  void begin(const PromptCacheIdentity& identity, std::span<const TokenId> tokens,
             std::int64_t page_bytes);
  // For each page in order.
  void add_page(std::span<const std::byte> page);
  void commit();

 private:
  NewFile file_;
  std::vector<TokenId> tokens_;
  std::vector<std::uint64_t> checksums_;
};

class PromptCacheReader {
 public:
  // Errors: those of MappedFile; malformed if it is no such file.
  explicit PromptCacheReader(const std::filesystem::path& path);

  // Before anything else is asked. Errors: invalid_argument if it was saved of another model, type
  // of keys and values, device, mode or version; malformed if it is truncated.
  void expect(const PromptCacheIdentity& own, std::int64_t page_bytes);
  std::span<const TokenId> tokens() const noexcept { return tokens_; }
  std::int64_t num_pages() const noexcept { return static_cast<std::int64_t>(checksums_.size()); }
  // A copy of page `index`, checked; valid until the next call. Errors: malformed, io.
  std::span<const std::byte> page(std::int64_t index);

 private:
  std::string metadata(const char* key) const;
  void find_tensors();

  MappedFile file_;
  std::string name_;  // quoted, for messages
  std::map<std::string, std::string> metadata_;
  std::vector<TokenId> tokens_;
  std::vector<std::uint64_t> checksums_;
  std::size_t pages_begin_ = 0;
  std::vector<std::byte> page_;
};

}  // namespace clusterfusion
