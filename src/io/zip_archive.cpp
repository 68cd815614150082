#include "io/zip_archive.hpp"

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "base/fail.hpp"
#include "io/byte_reader.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

constexpr std::uint64_t kLocalHeader = 0x04034b50;      // 4.3.7
constexpr std::uint64_t kCentralHeader = 0x02014b50;    // 4.3.12
constexpr std::uint64_t kZip64EndRecord = 0x06064b50;   // 4.3.14
constexpr std::uint64_t kZip64EndLocator = 0x07064b50;  // 4.3.15
constexpr std::uint64_t kEndRecord = 0x06054b50;        // 4.3.16
constexpr std::size_t kEndRecordBytes = 22;             // without its comment
constexpr std::size_t kZip64EndLocatorBytes = 20;
constexpr std::size_t kMaxCommentBytes = 0xFFFF;
constexpr std::size_t kCentralHeaderBytes = 46;  // without name, extra field and comment
constexpr std::uint64_t kSizesFollow = 1 << 3;   // 4.4.4: the local header may not have them
constexpr std::uint64_t kEncrypted = 1 << 0 | 1 << 6 | 1 << 13;
constexpr std::uint64_t kZip64ExtraField = 1;  // 4.5.3
// What stands in a field whose value is in a 64-bit one (4.4.1.4).
constexpr std::uint64_t kElsewhere32 = 0xFFFFFFFF;
constexpr std::uint64_t kElsewhere16 = 0xFFFF;

struct Directory {
  std::uint64_t begin = 0, bytes = 0, entries = 0;
};

// An entry as one of its two headers has it.
struct Header {
  std::string_view name;
  std::uint64_t flags = 0, method = 0;
  std::uint64_t stored_bytes = 0, plain_bytes = 0;
  std::uint64_t local_header = 0;  // only in the central directory
};

// The end record is the last thing in the file, but for a comment that may itself look like one.
std::size_t find_end_record(std::span<const std::byte> bytes, const std::string& file) {
  if (bytes.size() >= kEndRecordBytes) {
    const std::size_t last = bytes.size() - kEndRecordBytes;
    const std::size_t first = last - std::min(last, kMaxCommentBytes);
    for (std::size_t at = last + 1; at-- > first;) {
      ByteReader reader(bytes, file, at);
      if (reader.number(4, "a signature") != kEndRecord) continue;
      reader.take(16, "the end record");
      if (reader.number(2, "a comment's length") == last - at) return at;
    }
  }
  fail(ErrorKind::malformed,
       "{}: truncated or no zip file: expected the end of a central directory in the last bytes, "
       "found none; get the file again",
       file);
}

void require_one_disk(std::uint64_t disk, const std::string& file) {
  require(disk == 0, ErrorKind::unsupported,
          "{}: a zip file in several parts (disk {}); expected one in one part", file, disk);
}

// Where the central directory ends by the end record, and what it says of the directory.
std::size_t read_zip64_end_record(std::span<const std::byte> bytes, std::size_t locator,
                                  const std::string& file, Directory& directory) {
  ByteReader reader(bytes, file, locator + 4);
  require_one_disk(reader.number(4, "a disk's number"), file);
  const std::uint64_t begin = reader.number(8, "the place of the zip64 end record");
  require(begin < locator, ErrorKind::malformed,
          "{}: the zip64 end record should be at byte {}, behind its locator at byte {}", file,
          begin, locator);
  ByteReader record(bytes, file, static_cast<std::size_t>(begin));
  require(record.number(4, "a signature") == kZip64EndRecord, ErrorKind::malformed,
          "{}: expected a zip64 end record at byte {}, found none", file, begin);
  const std::uint64_t rest = record.number(8, "the zip64 end record's size");
  require(rest >= 44 && rest == locator - begin - 12, ErrorKind::malformed,
          "{}: the zip64 end record at byte {} should end at its locator, byte {}, but its size is "
          "{}",
          file, begin, locator, rest);
  record.take(4, "versions");
  require_one_disk(record.number(4, "a disk's number"), file);
  require_one_disk(record.number(4, "a disk's number"), file);
  const std::uint64_t entries_here = record.number(8, "a number of entries");
  directory.entries = record.number(8, "a number of entries");
  require(entries_here == directory.entries, ErrorKind::malformed,
          "{}: the zip64 end record counts {} and {} entries", file, entries_here,
          directory.entries);
  directory.bytes = record.number(8, "the central directory's size");
  directory.begin = record.number(8, "the central directory's place");
  return static_cast<std::size_t>(begin);
}

Directory read_end_record(std::span<const std::byte> bytes, const std::string& file) {
  const std::size_t end_record = find_end_record(bytes, file);
  ByteReader reader(bytes, file, end_record + 4);
  const std::uint64_t disk = reader.number(2, "a disk's number");
  const std::uint64_t directory_disk = reader.number(2, "a disk's number");
  const std::uint64_t entries_here = reader.number(2, "a number of entries");
  Directory directory;
  directory.entries = reader.number(2, "a number of entries");
  directory.bytes = reader.number(4, "the central directory's size");
  directory.begin = reader.number(4, "the central directory's place");

  std::size_t directory_end = end_record;
  const bool has_locator =
      end_record >= kZip64EndLocatorBytes &&
      ByteReader(bytes, file, end_record - kZip64EndLocatorBytes).number(4, "a signature") ==
          kZip64EndLocator;
  if (has_locator) {
    directory_end =
        read_zip64_end_record(bytes, end_record - kZip64EndLocatorBytes, file, directory);
  } else {
    if (disk != kElsewhere16) require_one_disk(disk, file);
    if (directory_disk != kElsewhere16) require_one_disk(directory_disk, file);
    require(entries_here == directory.entries, ErrorKind::malformed,
            "{}: the end record counts {} and {} entries", file, entries_here, directory.entries);
  }
  require(directory.begin <= directory_end && directory.bytes == directory_end - directory.begin,
          ErrorKind::malformed,
          "{}: the central directory should take {} bytes from byte {}, but it ends at byte {}",
          file, directory.bytes, directory.begin, directory_end);
  require(directory.entries <= directory.bytes / kCentralHeaderBytes, ErrorKind::malformed,
          "{}: the central directory should hold {} entries, too many for its {} bytes", file,
          directory.entries, directory.bytes);
  return directory;
}

// Takes from the zip64 extra field what the header says is there. The order is fixed.
void read_extra_field(std::span<const std::byte> extra, const std::string& where, Header& header) {
  ByteReader reader(extra, where + ", extra field");
  while (!reader.at_end()) {
    // Some writers leave up to three bytes of padding.
    if (extra.size() - reader.position() < 4) return;
    const std::uint64_t id = reader.number(2, "an id");
    const auto data = reader.take(reader.number(2, "a size"), "a field");
    if (id != kZip64ExtraField) continue;
    ByteReader values(data, where + ", zip64 sizes");
    for (std::uint64_t* value : {&header.plain_bytes, &header.stored_bytes, &header.local_header}) {
      if (*value == kElsewhere32) *value = values.number(8, "a size or place");
    }
    return;
  }
}

std::string name_for_messages(const std::string& file, std::string_view name) {
  return file + ", entry " + quote(name);
}

// The common middle of both headers: flags, method, time, date, CRC, sizes.
void read_middle(ByteReader& reader, Header& header) {
  header.flags = reader.number(2, "flags");
  header.method = reader.number(2, "a method");
  reader.take(8, "a time and a checksum");
  header.stored_bytes = reader.number(4, "a size");
  header.plain_bytes = reader.number(4, "a size");
}

Header read_central_header(ByteReader& reader) {
  const std::size_t begin = reader.position();
  require(reader.number(4, "a signature") == kCentralHeader, ErrorKind::malformed,
          "{}: expected an entry of the central directory at byte {}, found none", reader.where(),
          begin);
  reader.take(4, "versions");
  Header header;
  read_middle(reader, header);
  const std::uint64_t name_bytes = reader.number(2, "a name's length");
  const std::uint64_t extra_bytes = reader.number(2, "an extra field's length");
  const std::uint64_t comment_bytes = reader.number(2, "a comment's length");
  const std::uint64_t disk = reader.number(2, "a disk's number");
  if (disk != kElsewhere16) require_one_disk(disk, reader.where());
  reader.take(6, "attributes");
  header.local_header = reader.number(4, "a place");
  header.name = reader.text(name_bytes, "a name");
  const auto extra = reader.take(extra_bytes, "an extra field");
  reader.take(comment_bytes, "a comment");
  read_extra_field(extra, name_for_messages(reader.where(), header.name), header);
  return header;
}

void require_stored(const Header& header, const std::string& where) {
  require((header.flags & kEncrypted) == 0, ErrorKind::unsupported,
          "{}: encrypted; expected entries that are stored as they are", where);
  require(header.method == 0, ErrorKind::unsupported,
          "{}: compressed (method {}); expected entries that are stored as they are, as torch.save "
          "writes them",
          where, header.method);
  require(header.stored_bytes == header.plain_bytes, ErrorKind::malformed,
          "{}: stored as it is, but its sizes are {} and {} bytes", where, header.stored_bytes,
          header.plain_bytes);
}

// Finds the entry's bytes behind its local header, which must agree with the central one.
ZipEntry locate(std::span<const std::byte> before_directory, const Header& central,
                const std::string& file) {
  const std::string where = name_for_messages(file, central.name);
  require_stored(central, where);
  require(central.local_header < before_directory.size(), ErrorKind::malformed,
          "{}: should begin at byte {}, behind the {} bytes before the central directory", where,
          central.local_header, before_directory.size());
  ByteReader reader(before_directory, where, static_cast<std::size_t>(central.local_header));
  require(reader.number(4, "a signature") == kLocalHeader, ErrorKind::malformed,
          "{}: expected its local header at byte {}, found none", where, central.local_header);
  reader.take(2, "a version");
  Header local;
  read_middle(reader, local);
  const std::uint64_t name_bytes = reader.number(2, "a name's length");
  const std::uint64_t extra_bytes = reader.number(2, "an extra field's length");
  local.name = reader.text(name_bytes, "a name");
  read_extra_field(reader.take(extra_bytes, "an extra field"), where, local);
  require(local.name == central.name, ErrorKind::malformed,
          "{}: its local header at byte {} names {}", where, central.local_header,
          quote(local.name));
  // Sizes that follow the bytes count only where they do not stand in front as well.
  const bool is_without_sizes = (local.flags & kSizesFollow) != 0 && local.stored_bytes == 0;
  if (is_without_sizes) local.stored_bytes = local.plain_bytes = central.stored_bytes;
  require_stored(local, where);
  require(local.stored_bytes == central.stored_bytes, ErrorKind::malformed,
          "{}: {} bytes by its local header, but {} by the central directory", where,
          local.stored_bytes, central.stored_bytes);
  const std::size_t begin = reader.position();
  reader.take(central.stored_bytes, "its content");
  return {std::string(central.name), begin, reader.position()};
}

void check_names(const std::vector<ZipEntry>& entries, const std::string& file) {
  std::vector<std::string_view> names;
  for (const ZipEntry& entry : entries) names.push_back(entry.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  require(twice == names.end(), ErrorKind::malformed, "{}: two entries are called {}", file,
          twice == names.end() ? "" : quote(*twice));
}

void check_overlaps(const std::vector<ZipEntry>& entries, const std::string& file) {
  for (std::size_t i = 1; i < entries.size(); ++i) {
    require(entries[i].begin >= entries[i - 1].end, ErrorKind::malformed,
            "{}: entries {} and {} overlap: one ends at byte {}, the other begins at byte {}", file,
            quote(entries[i - 1].name), quote(entries[i].name), entries[i - 1].end,
            entries[i].begin);
  }
}

}  // namespace

std::vector<ZipEntry> parse_zip(std::span<const std::byte> bytes, const std::string& file) {
  const Directory directory = read_end_record(bytes, file);
  const auto directory_begin = static_cast<std::size_t>(directory.begin);
  const auto directory_end = directory_begin + static_cast<std::size_t>(directory.bytes);
  ByteReader reader(bytes.first(directory_end), file, directory_begin);
  std::vector<ZipEntry> entries;
  for (std::uint64_t i = 0; i < directory.entries; ++i) {
    entries.push_back(locate(bytes.first(directory_begin), read_central_header(reader), file));
  }
  require(reader.position() == directory_end, ErrorKind::malformed,
          "{}: the central directory holds {} entries up to byte {}, but should end at byte {}",
          file, entries.size(), reader.position(), directory_end);
  check_names(entries, file);
  std::sort(entries.begin(), entries.end(), [](const ZipEntry& a, const ZipEntry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  check_overlaps(entries, file);
  return entries;
}

}  // namespace clusterfusion
