#include "cli/output_file.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/fail.hpp"
#include "cli/token_text.hpp"

namespace clusterfusion::cli {

OutputFile::OutputFile(std::string path, std::string option)
    : path_(std::move(path)), option_(std::move(option)) {
  is_new_ = access(path_.c_str(), F_OK) != 0;
  errno = 0;
  // What is there stays until there is something better.
  file_ = std::fopen(path_.c_str(), "ab");
  if (file_ == nullptr) fail_writing(errno);
}

OutputFile::~OutputFile() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  if (is_new_) std::remove(path_.c_str());
}

void OutputFile::write(std::string_view content) {
  errno = 0;
  // A device or a pipe has no length, and needs none.
  if (ftruncate(fileno(file_), 0) != 0 && errno != EINVAL) fail_writing(errno);
  if (std::fwrite(content.data(), 1, content.size(), file_) != content.size() ||
      std::fflush(file_) != 0)
    fail_writing(errno);
  if (std::fclose(std::exchange(file_, nullptr)) != 0) fail_writing(errno);
}

void OutputFile::fail_writing(int error) const {
  const ErrorKind kind = error == ENOENT || error == ENOTDIR ? ErrorKind::not_found
                         : error == EACCES || error == EPERM ? ErrorKind::permission_denied
                                                             : ErrorKind::io;
  fail(kind, "{}: cannot write {}: {}; give a file in a folder that exists and can be written",
       option_, quote(path_), std::strerror(error));
}

}  // namespace clusterfusion::cli
