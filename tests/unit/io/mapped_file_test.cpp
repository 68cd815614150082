#include "io/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "io/file_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::TemporaryFolder;

std::string text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// Root may read everything: become somebody else for as long as this lives.
class WithoutRoot {
 public:
  WithoutRoot() {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) throw std::runtime_error("seteuid failed");
  }
  ~WithoutRoot() {
    if (::getuid() == 0 && ::seteuid(0) != 0) std::abort();
  }
};

TEST(MappedFile, HoldsTheBytesOfTheFile) {
  const TemporaryFolder folder;
  std::string content(100'000, '\0');
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7 % 251);
  const MappedFile file(folder.write("a", content));
  EXPECT_EQ(text_of(file), content);
  EXPECT_EQ(file.path(), folder.path() / "a");
  EXPECT_EQ(read_file(file.path(), content.size()), content);
}

TEST(MappedFile, MovesWithoutMovingTheBytes) {
  const TemporaryFolder folder;
  MappedFile file(folder.write("a", "abc"));
  const std::byte* address = file.bytes().data();
  const MappedFile moved(std::move(file));
  EXPECT_EQ(moved.bytes().data(), address);
  EXPECT_EQ(text_of(moved), "abc");
}

// As when a download starts again, or `cp` writes over a checkpoint that is in use.
TEST(MappedFile, ReadsZerosWhereTheFileBecameShorter) {
  const TemporaryFolder folder;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::filesystem::path path = folder.write("a", std::string(5 * page, 'x'));
  const MappedFile whole(folder.write("b", std::string(5 * page, 'y')));
  for (const std::size_t left : {3 * page, page / 2, std::size_t{0}}) {
    folder.write("a", std::string(5 * page, 'x'));
    const MappedFile file(path);
    EXPECT_EQ(text_of(file), std::string(5 * page, 'x'));
    EXPECT_FALSE(file.has_lost_pages());
    std::filesystem::resize_file(path, left);
    std::string expected(5 * page, '\0');
    expected.replace(0, left, left, 'x');
    EXPECT_EQ(text_of(file), expected);
    EXPECT_TRUE(file.has_lost_pages());
    EXPECT_FALSE(whole.has_lost_pages());
  }
  EXPECT_EQ(text_of(whole), std::string(5 * page, 'y'));
  folder.write("a", "new");
  EXPECT_FALSE(MappedFile(path).has_lost_pages());
}

TEST(MappedFileDeathTest, LeavesOtherBusErrorsAlone) {
  const TemporaryFolder folder;
  const MappedFile file(folder.write("a", "abc"));
  const std::filesystem::path path = folder.write("b", "abc");
  const int descriptor = ::open(path.c_str(), O_RDWR);
  void* other = ::mmap(nullptr, 3, PROT_READ, MAP_SHARED, descriptor, 0);
  ::close(descriptor);
  std::filesystem::resize_file(path, 0);
  EXPECT_DEATH(std::fputc(*static_cast<volatile char*>(other), stderr), "");
  EXPECT_FALSE(file.has_lost_pages());
  ::munmap(other, 3);
}

TEST(MappedFile, RefusesAGitLfsPointer) {
  const TemporaryFolder folder;
  const std::filesystem::path path =
      folder.write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:" +
                                            std::string(64, '0') + "\nsize 123456789\n");
  const std::vector<std::string> words{path.string(), "Git LFS pointer", "git lfs pull"};
  expect_error(ErrorKind::malformed, words, [&] { MappedFile{path}; });
  expect_error(ErrorKind::malformed, words, [&] { read_file(path, 1000); });
  const MappedFile other(folder.write("a", "version https://git-lfs.example.com"));
}

// Resident pages of a mapping, as the kernel counts them (the "Rss" of its entry in smaps).
std::int64_t resident_kb(const std::byte* begin) {
  std::ostringstream address;
  address << std::hex << reinterpret_cast<std::uintptr_t>(begin) << '-';
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  while (std::getline(smaps, line) && !line.starts_with(address.str())) {
  }
  while (std::getline(smaps, line)) {
    if (line.starts_with("Rss:")) return std::stoll(line.substr(4));
  }
  return -1;
}

TEST(MappedFile, ReleasesPagesAndKeepsTheirContent) {
  const TemporaryFolder folder;
  std::string content(4 << 20, '\0');
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7 % 251);
  const MappedFile file(folder.write("a", content));
  EXPECT_EQ(text_of(file), content);
  const std::int64_t before = resident_kb(file.bytes().data());
  if (before < 0) GTEST_SKIP() << "no /proc/self/smaps here";
  EXPECT_GT(before, 3072);
  file.release(file.bytes().subspan(5000, 3 << 20));
  EXPECT_LE(resident_kb(file.bytes().data()), 1024);
  EXPECT_EQ(text_of(file), content);
}

TEST(MappedFile, ReleasesNothingThatIsNotItsOwn) {
  const TemporaryFolder folder;
  const MappedFile file(folder.write("a", "abc"));
  // The pages of this vector hold what nobody could bring back.
  const std::vector<std::byte> other(1 << 20, std::byte{7});
  file.release(other);
  file.release({});
  EXPECT_EQ(std::ranges::count(other, std::byte{7}), std::ssize(other));
}

TEST(MappedFile, KeepsTheOldFileWhenANewOneIsRenamedOverIt) {
  const TemporaryFolder folder;
  const MappedFile file(folder.write("a", "old content"));
  std::filesystem::rename(folder.write("b", "new"), folder.path() / "a");
  EXPECT_EQ(text_of(file), "old content");
}

TEST(MappedFile, FollowsLinks) {
  const TemporaryFolder folder;
  const TemporaryFolder other;
  std::filesystem::create_symlink(other.write("blob", "abc"), folder.path() / "link");
  EXPECT_EQ(text_of(MappedFile(folder.path() / "link")), "abc");
}

TEST(MappedFile, RefusesWhatIsNotThere) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "missing";
  expect_error(ErrorKind::not_found, {path.string(), "No such file"}, [&] { MappedFile{path}; });
  expect_error(ErrorKind::not_found, {path.string()}, [&] { read_file(path, 10); });
  const std::filesystem::path below = folder.write("a", "abc") / "b";
  expect_error(ErrorKind::not_found, {below.string()}, [&] { MappedFile{below}; });
  EXPECT_FALSE(is_there(path));
  std::filesystem::create_symlink(path, folder.path() / "dangling");
  EXPECT_TRUE(is_there(folder.path() / "dangling"));
  expect_error(ErrorKind::not_found, {"dangling"}, [&] { MappedFile{folder.path() / "dangling"}; });
}

TEST(MappedFile, RefusesWhatMayNotBeRead) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.write("a", "abc");
  std::filesystem::permissions(path, std::filesystem::perms::none);
  std::filesystem::permissions(folder.path(), std::filesystem::perms::all);
  const WithoutRoot without_root;
  expect_error(ErrorKind::permission_denied, {path.string(), "Permission denied"},
               [&] { MappedFile{path}; });
  expect_error(ErrorKind::permission_denied, {path.string()}, [&] { read_file(path, 10); });
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
  const TemporaryFolder folder;
  expect_error(ErrorKind::io, {folder.path().string(), "regular file", "a folder"},
               [&] { MappedFile{folder.path()}; });
  const std::filesystem::path pipe = folder.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  expect_error(ErrorKind::io, {pipe.string(), "pipe"}, [&] { MappedFile{pipe}; });
  expect_error(ErrorKind::io, {"/dev/zero", "device"}, [&] { read_file("/dev/zero", 10); });
}

TEST(MappedFile, RefusesAnEmptyFile) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.write("a", "");
  expect_error(ErrorKind::malformed, {path.string(), "empty"}, [&] { MappedFile{path}; });
  EXPECT_EQ(read_file(path, 10), "");
}

TEST(ReadFile, RefusesAFileThatIsTooLarge) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.write("a", "12345678901");
  expect_error(ErrorKind::malformed, {path.string(), "at most 10 bytes", "found 11"},
               [&] { read_file(path, 10); });
}

}  // namespace
}  // namespace clusterfusion
