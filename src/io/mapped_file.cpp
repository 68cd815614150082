#include "io/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/fail.hpp"

namespace clusterfusion {
namespace {

ErrorKind kind_of_errno(int error) {
  switch (error) {
    case ENOENT:
    case ENOTDIR: return ErrorKind::not_found;
    case EACCES:
    case EPERM: return ErrorKind::permission_denied;
    case ENOMEM: return ErrorKind::out_of_memory;
    default: return ErrorKind::io;
  }
}

[[noreturn]] void fail_errno(const char* action, const std::filesystem::path& path) {
  const int error = errno;
  fail(kind_of_errno(error), "cannot {} {}: {}", action, path.string(),
       std::generic_category().message(error));
}

// An open regular file.
class FileDescriptor {
 public:
  explicit FileDescriptor(const std::filesystem::path& path) : path_(path) {
    // O_NONBLOCK: opening a pipe must not wait for a writer. It changes nothing for regular files.
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) fail_errno("open", path);
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) {
      const int error = errno;
      ::close(descriptor_);
      errno = error;
      fail_errno("examine", path);
    }
    if (!S_ISREG(status.st_mode)) {
      ::close(descriptor_);
      fail(ErrorKind::io, "cannot read {}: expected a regular file, found {}", path.string(),
           S_ISDIR(status.st_mode) ? "a folder" : "a device, pipe or socket");
    }
    size_ = static_cast<std::size_t>(status.st_size);
  }
  ~FileDescriptor() { ::close(descriptor_); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  std::size_t size() const noexcept { return size_; }

  // Up to `capacity` bytes from where the last read ended; 0 at the end of the file.
  std::size_t read(char* destination, std::size_t capacity) {
    while (true) {
      const ssize_t count = ::read(descriptor_, destination, capacity);
      if (count >= 0) return static_cast<std::size_t>(count);
      if (errno != EINTR) fail_errno("read", path_);
    }
  }

  // What a clone without git-lfs holds in place of large files.
  // https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
  void refuse_lfs_pointer() {
    constexpr std::string_view kStart = "version https://git-lfs.github.com/spec/";
    char start[kStart.size()];
    const bool is_pointer = ::pread(descriptor_, start, sizeof start, 0) == ssize_t{sizeof start} &&
                            std::string_view(start, sizeof start) == kStart;
    require(
        !is_pointer, ErrorKind::malformed,
        "{} is a Git LFS pointer, {} bytes that stand for a file which was not downloaded; get "
        "it with: git lfs install && git lfs pull (in that folder), or download the file itself",
        path_.string(), size_);
  }

  std::span<const std::byte> map() {
    // MAP_PRIVATE: nothing is written, and more file systems can do it than MAP_SHARED.
    void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor_, 0);
    if (address == MAP_FAILED) fail_errno("map", path_);
    return {static_cast<const std::byte*>(address), size_};
  }

 private:
  const std::filesystem::path& path_;
  int descriptor_ = -1;
  std::size_t size_ = 0;
};

}  // namespace

MappedFile::MappedFile(std::filesystem::path path) : path_(std::move(path)) {
  FileDescriptor file(path_);
  require(file.size() > 0, ErrorKind::malformed, "{} is empty", path_.string());
  file.refuse_lfs_pointer();
  bytes_ = file.map();
  guard_.emplace(bytes_);
}

MappedFile::~MappedFile() {
  guard_.reset();
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      bytes_(std::exchange(other.bytes_, {})),
      guard_(std::move(other.guard_)) {
  other.guard_.reset();
}

void MappedFile::release(std::span<const std::byte> part) const noexcept {
  // As numbers: `part` may point into any other memory.
  const auto address = [](const std::byte* byte) { return reinterpret_cast<std::uintptr_t>(byte); };
  const std::uintptr_t start = address(bytes_.data());
  const std::uintptr_t begin = address(part.data());
  const bool is_inside =
      begin >= start && begin + part.size() <= start + bytes_.size() && !part.empty();
  if (!is_inside) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t first_page = begin / page * page;
  // Nothing was ever written to these private pages, so nothing is lost. It is advice: whether it
  // is taken does not matter.
  ::madvise(reinterpret_cast<void*>(first_page), begin + part.size() - first_page, MADV_DONTNEED);
}

std::string read_file(const std::filesystem::path& path, std::size_t max_bytes) {
  FileDescriptor file(path);
  require(file.size() <= max_bytes, ErrorKind::malformed,
          "{} is too large: expected at most {} bytes, found {}", path.string(), max_bytes,
          file.size());
  file.refuse_lfs_pointer();
  std::string text(file.size(), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const std::size_t count = file.read(text.data() + done, text.size() - done);
    require(count > 0, ErrorKind::io, "{} became shorter while it was read: {} of {} bytes",
            path.string(), done, text.size());
    done += count;
  }
  return text;
}

bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const auto status = std::filesystem::symlink_status(path, error);
  return status.type() != std::filesystem::file_type::not_found;
}

}  // namespace clusterfusion
