// Torch's files, built byte by byte so that a test can bend each field: zip archives and pickles.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/file_fixtures.hpp"

namespace clusterfusion::test {

inline std::string little(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i));
  return text;
}

// (GCC 12 warns of operator+ with a literal in front, falsely.)
inline std::string join(std::initializer_list<std::string_view> parts) {
  std::string all;
  for (const std::string_view part : parts) all += part;
  return all;
}

// An entry, and what its headers say where that is not the truth.
struct ZipPart {
  std::string name;
  std::string content;
  std::uint64_t flags = 0;
  std::uint64_t method = 0;
  std::uint64_t disk = 0;
  std::optional<std::string> local_name = {};
  std::optional<std::uint64_t> local_bytes = {}, central_bytes = {}, central_plain_bytes = {};
  std::optional<std::uint64_t> local_header = {};
};

struct ZipOptions {
  bool zip64 = false;  // all sizes and places in 64-bit fields
  std::size_t alignment = 64;
  std::string comment = "";
  std::optional<std::uint64_t> entries = {}, directory_bytes = {}, directory_begin = {};
};

inline std::string zip_header_middle(const ZipPart& part, std::uint64_t stored,
                                     std::uint64_t plain) {
  return little(part.flags, 2) + little(part.method, 2) + little(0, 8) + little(stored, 4) +
         little(plain, 4);
}

inline std::string zip_local_header(const ZipPart& part, const ZipOptions& options,
                                    std::size_t at) {
  const std::string name = part.local_name.value_or(part.name);
  const std::uint64_t bytes = part.local_bytes.value_or(part.content.size());
  std::string extra;
  if (options.zip64) extra = little(1, 2) + little(16, 2) + little(bytes, 8) + little(bytes, 8);
  const std::size_t end = at + 30 + name.size() + extra.size() + 4;
  const std::size_t padding = (options.alignment - end % options.alignment) % options.alignment;
  extra += "FB" + little(padding, 2) + std::string(padding, 'Z');  // as torch pads
  const std::uint64_t field = options.zip64 ? 0xFFFFFFFF : bytes;
  return join({"PK\3\4", little(0, 2), zip_header_middle(part, field, field),
               little(name.size(), 2), little(extra.size(), 2), name, extra});
}

inline std::string zip_central_header(const ZipPart& part, const ZipOptions& options,
                                      std::size_t local_header) {
  const std::uint64_t stored = part.central_bytes.value_or(part.content.size());
  const std::uint64_t plain = part.central_plain_bytes.value_or(stored);
  const std::uint64_t place = part.local_header.value_or(local_header);
  std::string extra;
  if (options.zip64) {
    extra = little(1, 2) + little(24, 2) + little(plain, 8) + little(stored, 8) + little(place, 8);
  }
  const auto field = [&](std::uint64_t value) { return options.zip64 ? 0xFFFFFFFF : value; };
  return "PK\1\2" + little(0, 4) + zip_header_middle(part, field(stored), field(plain)) +
         little(part.name.size(), 2) + little(extra.size(), 2) + little(0, 2) +
         little(part.disk, 2) + little(0, 6) + little(field(place), 4) + part.name + extra;
}

inline std::string zip_file(const std::vector<ZipPart>& parts, const ZipOptions& options = {}) {
  std::string file;
  std::string directory;
  for (const ZipPart& part : parts) {
    directory += zip_central_header(part, options, file.size());
    file += zip_local_header(part, options, file.size()) + part.content;
  }
  const std::uint64_t begin = options.directory_begin.value_or(file.size());
  const std::uint64_t bytes = options.directory_bytes.value_or(directory.size());
  const std::uint64_t entries = options.entries.value_or(parts.size());
  file += directory;
  if (options.zip64) {
    const std::size_t record = file.size();
    file += "PK\6\6" + little(44, 8) + little(0, 4) + little(0, 8) + little(entries, 8) +
            little(entries, 8) + little(bytes, 8) + little(begin, 8);
    file += "PK\6\7" + little(0, 4) + little(record, 8) + little(1, 4);
  }
  const auto field = [&](std::uint64_t value, int size) {
    return little(options.zip64 ? ~std::uint64_t{0} : value, size);
  };
  return file + "PK\5\6" + little(0, 4) + field(entries, 2) + field(entries, 2) + field(bytes, 4) +
         field(begin, 4) + little(options.comment.size(), 2) + options.comment;
}

// Pieces of pickles. A value is an expression: a pickle that leaves it on the stack.
namespace pickled {

inline std::string number(std::int64_t value) {
  return join({"\x8a\x08", little(static_cast<std::uint64_t>(value), 8)});
}
inline std::string text(const std::string& value) {
  return join({"X", little(value.size(), 4), value});
}
inline std::string tuple(const std::vector<std::string>& items) {
  std::string all = "(";
  for (const std::string& item : items) all += item;
  return join({all, "t"});
}
inline std::string numbers(const std::vector<std::int64_t>& values) {
  std::vector<std::string> items;
  for (const std::int64_t value : values) items.push_back(number(value));
  return tuple(items);
}
inline std::string global(const std::string& module, const std::string& name) {
  return join({"c", module, "\n", name, "\n"});
}
inline std::string call(const std::string& callable, const std::string& arguments) {
  return join({callable, arguments, "R"});
}
inline std::string ordered_dict() { return call(global("collections", "OrderedDict"), ")"); }
inline std::string storage(const std::string& type, const std::string& key, std::int64_t elements) {
  return join(
      {tuple({text("storage"), global("torch", type), text(key), text("cpu"), number(elements)}),
       "Q"});
}
inline std::string tensor(const std::string& storage, std::int64_t offset,
                          const std::vector<std::int64_t>& size,
                          const std::vector<std::int64_t>& stride) {
  return call(
      global("torch._utils", "_rebuild_tensor_v2"),
      tuple({storage, number(offset), numbers(size), numbers(stride), "\x89", ordered_dict()}));
}
using Entries = std::vector<std::pair<std::string, std::string>>;
// {key: value, ...} set in `dict`.
inline std::string entries(const std::string& dict, const Entries& values) {
  std::string all = join({dict, "("});
  for (const auto& [key, value] : values) all += text(key) + value;
  return join({all, "u"});
}
inline std::string file(const std::string& value) { return join({"\x80\x02", value, "."}); }

}  // namespace pickled

// The entries of a file of torch's with this pickle and these storages.
inline std::vector<ZipPart> torch_parts(const std::string& pickle,
                                        const std::vector<std::string>& storages) {
  std::vector<ZipPart> parts = {{"archive/data.pkl", pickle}, {"archive/byteorder", "little"}};
  for (std::size_t i = 0; i < storages.size(); ++i) {
    parts.push_back({"archive/data/" + std::to_string(i), storages[i]});
  }
  parts.push_back({"archive/version", "3\n"});
  return parts;
}

// A well-formed file with these tensors, each in a storage of its own; row-major, but for those
// with `other_strides`.
inline std::string torch_file(
    const std::vector<RawTensor>& tensors, const ZipOptions& options = {},
    const std::map<std::string, std::vector<std::int64_t>>& other_strides = {}) {
  pickled::Entries entries;
  std::vector<std::string> storages;
  for (const RawTensor& tensor : tensors) {
    const std::string& tag = tensor.dtype;
    const std::string type = tag == "F16"    ? "HalfStorage"
                             : tag == "BF16" ? "BFloat16Storage"
                             : tag == "F32"  ? "FloatStorage"
                             : tag == "BOOL" ? "BoolStorage"
                                             : "ByteStorage";
    std::int64_t count = 1;
    std::vector<std::int64_t> strides(tensor.shape.size());
    for (std::size_t axis = strides.size(); axis-- > 0;) {
      strides[axis] = count;
      count *= tensor.shape[axis];
    }
    const auto other = other_strides.find(tensor.name);
    if (other != other_strides.end()) strides = other->second;
    const std::string key = std::to_string(storages.size());
    entries.emplace_back(
        tensor.name, pickled::tensor(pickled::storage(type, key, count), 0, tensor.shape, strides));
    storages.push_back(tensor.data);
  }
  return zip_file(
      torch_parts(pickled::file(pickled::entries(pickled::ordered_dict(), entries)), storages),
      options);
}

}  // namespace clusterfusion::test
