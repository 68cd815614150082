// A file with a result in it.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

namespace clusterfusion::cli {

// Opened before the work, so that a path that cannot be written is known then. `option` names it in
// messages. Errors: not_found, permission_denied, io.
class OutputFile {
 public:
  OutputFile(std::string path, std::string option);
  // Without write(), or if that failed, nothing is left behind of a new file.
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Once; all of `content`.
  void write(std::string_view content);

 private:
  [[noreturn]] void fail_writing(int error) const;

  const std::string path_, option_;
  std::FILE* file_ = nullptr;
  bool is_new_ = false;
};

}  // namespace clusterfusion::cli
