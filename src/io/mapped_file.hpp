// Files, read whole or memory-mapped, with errors that name the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace clusterfusion {

// A regular file, mapped read-only. Nothing is read before it is touched; pages that are touched
// belong to the page cache and can be dropped again by the operating system.
//
// The size is the file's size at the time of opening. Whoever makes a mapped file shorter takes
// the pages away under the reader, and the operating system ends the reader with SIGBUS: replace a
// checkpoint by renaming a new file over it, which leaves the old one in place until it is closed.
class MappedFile {
 public:
  // Errors: not_found, permission_denied, out_of_memory, io (also for what is no regular file),
  // malformed for an empty file.
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const noexcept { return bytes_; }
  const std::filesystem::path& path() const noexcept { return path_; }

  // Lets go of the pages in which `part` lies, if it lies in this file: they leave the process's
  // resident memory, stay in the page cache, and come back when they are touched.
  void release(std::span<const std::byte> part) const noexcept;

 private:
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

// The whole of a small regular file. Errors: those of MappedFile, but a file may be empty;
// malformed if it is larger than `max_bytes`.
std::string read_file(const std::filesystem::path& path, std::size_t max_bytes);

// Whether opening `path` can say more than that it does not exist. True for a dangling link or
// where the folder cannot be searched: opening it then says what is wrong.
bool is_there(const std::filesystem::path& path);

}  // namespace clusterfusion
