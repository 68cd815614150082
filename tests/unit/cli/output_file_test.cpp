#include "cli/output_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "clusterfusion/error.hpp"
#include "io/file_fixtures.hpp"

namespace clusterfusion::cli {
namespace {

class OutputFileTest : public ::testing::Test {
 protected:
  std::string content(const std::filesystem::path& path) const {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  const clusterfusion::test::TemporaryFolder temporary_;
  const std::filesystem::path folder_ = temporary_.path();
};

TEST_F(OutputFileTest, HoldsWhatWasWritten) {
  const std::filesystem::path path = folder_ / "new";
  OutputFile(path, "--timeline").write("content");
  EXPECT_EQ(content(path), "content");
  OutputFile(path, "--timeline").write("other");
  EXPECT_EQ(content(path), "other");
}

TEST_F(OutputFileTest, LeavesThingsAsTheyWereIfNothingIsWritten) {
  const std::filesystem::path path = folder_ / "old";
  std::ofstream(path) << "kept";
  { const OutputFile file(path, "--timeline"); }
  EXPECT_EQ(content(path), "kept");
  { const OutputFile file(folder_ / "new", "--timeline"); }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "new"));
}

TEST_F(OutputFileTest, SaysWhyItCannotBeWritten) {
  const auto error_of = [](const std::filesystem::path& path) {
    try {
      OutputFile(path, "--timeline").write("content");
    } catch (const Error& error) {
      EXPECT_THAT(error.what(),
                  ::testing::HasSubstr("--timeline: cannot write \"" + path.string()));
      return error.kind();
    }
    ADD_FAILURE() << "no error";
    return ErrorKind::internal;
  };
  EXPECT_EQ(error_of(folder_ / "none" / "file"), ErrorKind::not_found);
  EXPECT_EQ(error_of(folder_), ErrorKind::io);
  if (std::filesystem::exists("/dev/full")) {
    EXPECT_EQ(error_of("/dev/full"), ErrorKind::io);
    EXPECT_TRUE(std::filesystem::exists("/dev/full"));
  }
}

}  // namespace
}  // namespace clusterfusion::cli
