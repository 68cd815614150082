#include "io/new_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"

namespace clusterfusion {

NewFile::NewFile(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code unknown;
  const auto status = std::filesystem::status(path_, unknown);
  require(!std::filesystem::exists(status) || std::filesystem::is_regular_file(status),
          ErrorKind::io, "cannot write {}: it is no regular file; give the name of a file",
          quote(path_.string()));
  if (std::filesystem::is_symlink(std::filesystem::symlink_status(path_, unknown))) {
    path_ = std::filesystem::weakly_canonical(path_, unknown);
  }
  for (int attempt = 0; descriptor_ < 0; ++attempt) {
    temporary_ = fmt::format("{}.{}-{}.part", path_.string(), ::getpid(), attempt);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0 && errno != EEXIST) fail_writing(errno);
  }
}

NewFile::~NewFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void NewFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_writing(errno);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void NewFile::commit() {
  if (::fsync(descriptor_) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail_writing(errno);
  }
  ::close(std::exchange(descriptor_, -1));
}

void NewFile::fail_writing(int error) const {
  const ErrorKind kind = error == ENOENT || error == ENOTDIR ? ErrorKind::not_found
                         : error == EACCES || error == EPERM ? ErrorKind::permission_denied
                                                             : ErrorKind::io;
  fail(kind,
       "cannot write {}: {}; give a file in a folder that exists, can be written and has room",
       quote(path_.string()), std::strerror(error));
}

}  // namespace clusterfusion
