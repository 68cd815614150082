#include "io/new_file.hpp"

#include "io/file_fixtures.hpp"
#include "io/mapped_file.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::TemporaryFolder;

void write(NewFile& file, std::string_view text) { file.write(std::as_bytes(std::span(text))); }

std::size_t num_files(const TemporaryFolder& folder) {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator(folder.path()), {}));
}

TEST(NewFile, AppearsWholeOrNotAtAll) {
  const TemporaryFolder folder;
  const auto path = folder.write("a", "before");
  {
    NewFile file(path);
    write(file, "half");
    EXPECT_EQ(read_file(path, 100), "before");
  }
  EXPECT_EQ(read_file(path, 100), "before");
  EXPECT_EQ(num_files(folder), 1u) << "nothing is left of what was not committed";
  NewFile file(path);
  write(file, "all ");
  write(file, "of it");
  file.commit();
  EXPECT_EQ(read_file(path, 100), "all of it");
  EXPECT_EQ(num_files(folder), 1u);
}

TEST(NewFile, TwoOfOneNameDoNotMeet) {
  const TemporaryFolder folder;
  NewFile first(folder.path() / "a"), second(folder.path() / "a");
  write(first, "first");
  write(second, "second");
  first.commit();
  second.commit();
  EXPECT_EQ(read_file(folder.path() / "a", 100), "second");
}

TEST(NewFile, KeepsALink) {
  const TemporaryFolder folder;
  const auto path = folder.write("a", "before");
  std::filesystem::create_symlink(path, folder.path() / "link");
  NewFile file(folder.path() / "link");
  write(file, "after");
  file.commit();
  EXPECT_TRUE(std::filesystem::is_symlink(folder.path() / "link"));
  EXPECT_EQ(read_file(path, 100), "after");
}

TEST(NewFile, TellsWhereNoFileCanBe) {
  const TemporaryFolder folder;
  expect_error(ErrorKind::not_found, {"cannot write", "No such file or directory"},
               [&] { NewFile(folder.path() / "no" / "a"); });
  expect_error(ErrorKind::io, {"no regular file"}, [&] { NewFile{folder.path()}; });
  expect_error(ErrorKind::io, {"no regular file"}, [&] { NewFile("/dev/null"); });
}

}  // namespace
}  // namespace clusterfusion
