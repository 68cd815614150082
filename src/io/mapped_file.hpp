// Files, read whole or memory-mapped, with errors that name the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

#include "io/mapping_guard.hpp"

namespace clusterfusion {

// A regular file, mapped read-only. Nothing is read before it is touched; pages that are touched
// belong to the page cache and can be dropped again by the operating system.
//
// The size is the file's size at the time of opening. Whoever makes a mapped file shorter takes
// the pages away under the reader: zeros then stand for them, and has_lost_pages() says so. Replace
// a checkpoint by renaming a new file over it, which leaves the old one in place until it is
// closed.
class MappedFile {
 public:
  // Errors: not_found, permission_denied, out_of_memory, io (also for what is no regular file),
  // malformed for an empty file and for a Git LFS pointer.
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const noexcept { return bytes_; }
  const std::filesystem::path& path() const noexcept { return path_; }
  // What was read from the file since may be wrong: it became shorter, or could not be read.
  bool has_lost_pages() const noexcept { return guard_ && guard_->has_lost_pages(); }

  // Lets go of the pages in which `part` lies, if it lies in this file: they leave the process's
  // resident memory, stay in the page cache, and come back when they are touched.
  void release(std::span<const std::byte> part) const noexcept;

 private:
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
  std::optional<MappingGuard> guard_;
};

// The whole of a small regular file. Errors: those of MappedFile, but a file may be empty;
// malformed if it is larger than `max_bytes` or a Git LFS pointer.
std::string read_file(const std::filesystem::path& path, std::size_t max_bytes);

// Whether opening `path` can say more than that it does not exist. True for a dangling link or
// where the folder cannot be searched: opening it then says what is wrong.
bool is_there(const std::filesystem::path& path);

}  // namespace clusterfusion
