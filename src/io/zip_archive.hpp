// Zip archives whose files are stored as they are, so that they can be used in place:
// https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (numbers of sections in the code).
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace clusterfusion {

struct ZipEntry {
  std::string name;
  std::size_t begin = 0, end = 0;  // where its bytes are, counted from the archive's start
};

// Reads the central directory and each entry's local header, with 64-bit sizes where they are used,
// and checks that they agree; touches no entry's bytes, and so no checksum. The archive fills
// `bytes`, no two entries share a name or bytes. `file` stands for the bytes in messages. The
// entries come in the order of their bytes.
// Errors: malformed; unsupported for compressed or encrypted entries and archives of several disks.
std::vector<ZipEntry> parse_zip(std::span<const std::byte> bytes, const std::string& file);

}  // namespace clusterfusion
