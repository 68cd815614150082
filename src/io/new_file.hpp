// A file that appears whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace clusterfusion {

// Written under another name in the same folder, and renamed to `path` when it is whole: what was
// there before stays until then. Not committed, nothing remains of it.
// Errors of all calls: not_found, permission_denied, io.
class NewFile {
 public:
  // Also io if something else than a regular file is at `path`.
  explicit NewFile(std::filesystem::path path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(std::span<const std::byte> bytes);
  // Gives it its name, once what was written is on the disk.
  void commit();

 private:
  [[noreturn]] void fail_writing(int error) const;

  std::filesystem::path path_;
  std::string temporary_;
  int descriptor_ = -1;
};

}  // namespace clusterfusion
