#include "io/zip_archive.hpp"

#include <string>

#include "io/torch_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::little;
using test::zip_file;
using test::ZipOptions;
using test::ZipPart;

std::vector<ZipEntry> entries_of(const std::string& file) {
  return parse_zip(std::as_bytes(std::span(file)), "a.zip");
}

void expect_malformed_zip(std::vector<std::string> words, const std::string& file) {
  words.push_back("a.zip");
  expect_error(ErrorKind::malformed, words, [&] { entries_of(file); });
}

void expect_unsupported_zip(std::vector<std::string> words, const std::string& file) {
  words.push_back("a.zip");
  expect_error(ErrorKind::unsupported, words, [&] { entries_of(file); });
}

std::string content_of(const std::string& file, const ZipEntry& entry) {
  return file.substr(entry.begin, entry.end - entry.begin);
}

TEST(Zip, FindsEntriesInTheOrderOfTheirBytes) {
  for (const bool zip64 : {false, true}) {
    for (const std::string& comment : {std::string(), std::string("PK\5\6 no end record")}) {
      const std::string file = zip_file({{"b", "first"}, {"a/c", ""}, {"a", "last"}},
                                        {.zip64 = zip64, .comment = comment});
      const std::vector<ZipEntry> entries = entries_of(file);
      ASSERT_EQ(entries.size(), 3U);
      EXPECT_EQ(entries[0].name, "b");
      EXPECT_EQ(content_of(file, entries[0]), "first");
      EXPECT_EQ(entries[0].begin % 64, 0U);
      EXPECT_EQ(entries[1].name, "a/c");
      EXPECT_EQ(content_of(file, entries[1]), "");
      EXPECT_EQ(content_of(file, entries[2]), "last");
    }
  }
}

TEST(Zip, FindsNoEntry) { EXPECT_TRUE(entries_of(zip_file({})).empty()); }

// Bit 3: what stands behind the bytes was not known when the header was written.
TEST(Zip, TakesSizesThatFollow) {
  const std::string file =
      zip_file({{.name = "a", .content = "abc", .flags = 8, .local_bytes = 0}});
  EXPECT_EQ(content_of(file, entries_of(file).at(0)), "abc");
}

TEST(Zip, RefusesEveryTruncation) {
  for (const bool zip64 : {false, true}) {
    const std::string file = zip_file({{"a", "content"}, {"b", "more"}}, {.zip64 = zip64});
    for (std::size_t size = 0; size < file.size(); ++size) {
      expect_malformed_zip({"expected"}, file.substr(0, size));
    }
  }
}

TEST(Zip, RefusesBytesInFrontAndBehind) {
  const std::string file = zip_file({{"a", "content"}});
  expect_malformed_zip({"central directory should take"}, "x" + file);
  expect_malformed_zip({"no zip file"}, file + "x");
}

TEST(Zip, RefusesWhatCannotBeUsedInPlace) {
  expect_unsupported_zip({"\"a\"", "compressed (method 8)", "stored"},
                         zip_file({{"a", "x", 0, 8}}));
  expect_unsupported_zip({"\"a\"", "encrypted"}, zip_file({{"a", "x", 1}}));
  expect_unsupported_zip({"several parts (disk 2)"}, zip_file({{"a", "x", 0, 0, 2}}));
}

TEST(Zip, RefusesTwoEntriesOfOneName) {
  expect_malformed_zip({"two entries", "\"a\""}, zip_file({{"a", "x"}, {"b", ""}, {"a", "y"}}));
}

TEST(Zip, RefusesEntriesThatShareBytes) {
  const ZipPart same{.name = "a", .content = "x", .local_header = 0};
  ZipPart other{.name = "b", .content = "", .central_bytes = 1, .local_header = 0};
  expect_malformed_zip({"\"b\"", "local header at byte 0 names \"a\""}, zip_file({same, other}));
  // The first entry's bytes reach into the second's.
  const std::string file =
      zip_file({{.name = "a", .content = "x", .local_bytes = 100, .central_bytes = 100},
                {"b", std::string(100, 'b')}});
  expect_malformed_zip({"overlap", "\"a\"", "\"b\""}, file);
}

TEST(Zip, RefusesHeadersThatDisagree) {
  expect_malformed_zip({"\"a\"", "2 bytes by its local header", "1 by the central"},
                       zip_file({{.name = "a", .content = "x", .local_bytes = 2}}));
  expect_malformed_zip({"\"a\"", "sizes are 1 and 2 bytes"},
                       zip_file({{.name = "a", .content = "x", .central_plain_bytes = 2}}));
  expect_malformed_zip({"\"a\"", "names \"b\""},
                       zip_file({{.name = "a", .content = "x", .local_name = "b"}}));
}

TEST(Zip, RefusesPlacesOutsideTheFile) {
  for (const bool zip64 : {false, true}) {
    const ZipOptions options{.zip64 = zip64};
    for (const std::uint64_t place : {std::uint64_t{1000}, std::uint64_t{0xFFFFFFF0}}) {
      expect_malformed_zip(
          {"\"a\"", std::to_string(place), "behind"},
          zip_file({{.name = "a", .content = "x", .local_header = place}}, options));
    }
    expect_malformed_zip({"\"a\"", "local header at byte 1"},
                         zip_file({{.name = "a", .content = "x", .local_header = 1}}, options));
  }
  const std::uint64_t huge = ~std::uint64_t{0} - 5;
  const ZipOptions zip64{.zip64 = true};
  expect_malformed_zip({"\"a\"", std::to_string(huge)},
                       zip_file({{.name = "a", .content = "x", .local_header = huge}}, zip64));
  expect_malformed_zip(
      {"\"a\"", "truncated", std::to_string(huge)},
      zip_file({{.name = "a", .content = "x", .local_bytes = huge, .central_bytes = huge}}, zip64));
}

TEST(Zip, RefusesACentralDirectoryThatLies) {
  const std::vector<ZipPart> parts = {{"a", "x"}, {"b", "y"}};
  for (const bool zip64 : {false, true}) {
    const std::uint64_t huge = zip64 ? ~std::uint64_t{0} : 0xFFFFFFFE;
    expect_malformed_zip({"central directory"}, zip_file(parts, {.zip64 = zip64, .entries = 1}));
    expect_malformed_zip({}, zip_file(parts, {.zip64 = zip64, .entries = 3}));
    expect_malformed_zip({"central directory should take"},
                         zip_file(parts, {.zip64 = zip64, .directory_bytes = 5}));
    expect_malformed_zip({"central directory should take"},
                         zip_file(parts, {.zip64 = zip64, .directory_bytes = huge}));
    expect_malformed_zip({"central directory should take"},
                         zip_file(parts, {.zip64 = zip64, .directory_begin = huge}));
  }
  expect_malformed_zip({"truncated"}, zip_file({{std::string(100, 'a'), ""}}, {.entries = 2}));
  expect_malformed_zip({"too many"},
                       zip_file(parts, {.zip64 = true, .entries = ~std::uint64_t{0}}));
}

TEST(Zip, RefusesAZip64RecordElsewhere) {
  std::string file = zip_file({{"a", "x"}}, {.zip64 = true});
  const std::size_t locator = file.find("PK\6\7");
  file.replace(locator + 8, 8, little(~std::uint64_t{0} - 1, 8));
  expect_malformed_zip({"zip64 end record"}, file);
  file.replace(locator + 8, 8, little(0, 8));
  expect_malformed_zip({"zip64 end record at byte 0"}, file);
}

}  // namespace
}  // namespace clusterfusion
