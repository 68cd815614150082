#include "io/torch_file.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "io/pickle.hpp"
#include "io/zip_archive.hpp"

namespace clusterfusion {
namespace {

using Kind = PickleValue::Kind;

struct Storage {
  std::string_view global;
  std::string_view dtype;  // as safetensors spells it
  std::int64_t element_bytes;
};

constexpr std::array<Storage, 10> kStorages{{
    {"torch.HalfStorage", "F16", 2},
    {"torch.BFloat16Storage", "BF16", 2},
    {"torch.FloatStorage", "F32", 4},
    {"torch.DoubleStorage", "F64", 8},
    {"torch.LongStorage", "I64", 8},
    {"torch.IntStorage", "I32", 4},
    {"torch.ShortStorage", "I16", 2},
    {"torch.CharStorage", "I8", 1},
    {"torch.ByteStorage", "U8", 1},
    {"torch.BoolStorage", "BOOL", 1},
}};

constexpr std::string_view kOrderedDict = "collections.OrderedDict";
constexpr std::string_view kTensor = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kParameter = "torch._utils._rebuild_parameter";
constexpr std::string_view kParameterWithState = "torch._utils._rebuild_parameter_with_state";
constexpr std::string_view kSize = "torch.Size";

constexpr auto kAllowed = [] {
  std::array<std::string_view, kStorages.size() + 5> allowed{kOrderedDict, kTensor, kParameter,
                                                             kParameterWithState, kSize};
  for (std::size_t i = 0; i < kStorages.size(); ++i) allowed[5 + i] = kStorages[i].global;
  return allowed;
}();

// PyTorchStreamReader's kMinSupportedFileFormatVersion and kMaxSupportedFileFormatVersion.
constexpr int kMinVersion = 1;
constexpr int kMaxVersion = 10;

constexpr std::size_t kMaxDimensions = 64;  // torch's own limit

// What PyTorch wrote before 1.6: pickles behind each other, the first of a magic number.
void refuse_old_format(std::span<const std::byte> bytes, const std::string& file) {
  constexpr std::string_view kMagic = "\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.";
  const std::string_view head(reinterpret_cast<const char*>(bytes.data()),
                              std::min<std::size_t>(bytes.size(), 64));
  if (!head.starts_with("\x80") || head.find(kMagic) == head.npos) return;
  fail(ErrorKind::unsupported,
       "{0}: the format that PyTorch wrote before version 1.6; expected the zip format. Convert it "
       "once with: python -c \"import os, torch; f = '{0}'; torch.save(torch.load(f, "
       "map_location='cpu', weights_only=True), f + '.new'); os.replace(f + '.new', f)\"",
       file);
}

// The archive's entries, by their names in its one folder.
class Records {
 public:
  Records(std::span<const std::byte> bytes, const std::string& file)
      : bytes_(bytes), file_(file), entries_(parse_zip(bytes, file)) {
    std::sort(entries_.begin(), entries_.end(),
              [](const ZipEntry& a, const ZipEntry& b) { return a.name < b.name; });
    constexpr std::string_view kPickle = "/data.pkl";
    for (const ZipEntry& entry : entries_) {
      if (!entry.name.ends_with(kPickle)) continue;
      const std::string folder = entry.name.substr(0, entry.name.size() - kPickle.size() + 1);
      if (folder.find('/') + 1 != folder.size()) continue;
      require(folder_.empty(), ErrorKind::malformed, "{}: two state dicts, {} and {}; expected one",
              file, quote(folder_ + "data.pkl"), quote(entry.name));
      folder_ = folder;
    }
    require(!folder_.empty(), ErrorKind::malformed,
            "{}: a zip file without FOLDER/data.pkl; expected what torch.save writes", file);
  }

  const ZipEntry* find(std::string_view name) const {
    const std::string full = fmt::format("{}{}", folder_, name);
    const auto before = [](const ZipEntry& entry, const std::string& n) { return entry.name < n; };
    const auto found = std::lower_bound(entries_.begin(), entries_.end(), full, before);
    return found == entries_.end() || found->name != full ? nullptr : &*found;
  }
  std::span<const std::byte> bytes_of(const ZipEntry& entry) const {
    return bytes_.subspan(entry.begin, entry.end - entry.begin);
  }
  // Of a small entry; nothing if there is none.
  std::optional<std::string_view> text(std::string_view name) const {
    const ZipEntry* entry = find(name);
    if (entry == nullptr) return std::nullopt;
    const auto bytes = bytes_of(*entry);
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  const std::string& file() const noexcept { return file_; }
  const std::string& folder() const noexcept { return folder_; }

 private:
  std::span<const std::byte> bytes_;
  const std::string& file_;
  std::vector<ZipEntry> entries_;
  std::string folder_;  // with its slash
};

void check_version(const Records& records) {
  const std::optional<std::string_view> text = records.text("version");
  require(text.has_value(), ErrorKind::malformed, "{}: no entry {}", records.file(),
          quote(records.folder() + "version"));
  int version = 0;
  std::from_chars(text->data(), text->data() + text->size(), version);
  require(version >= kMinVersion && version <= kMaxVersion, ErrorKind::unsupported,
          "{}: format version {}; expected {} to {}", records.file(), quote(*text), kMinVersion,
          kMaxVersion);
}

void check_byte_order(const Records& records) {
  const std::string_view order = records.text("byteorder").value_or("little");
  require(order == "little", ErrorKind::unsupported, "{}: byte order {}; expected \"little\"",
          records.file(), quote(order));
}

// One tensor of the state dict, from its pickled call to its place in the file.
class TensorReader {
 public:
  TensorReader(const Records& records, std::string name)
      : records_(records),
        where_(fmt::format("{}: tensor {}", records.file(), quote(name))),
        name_(std::move(name)) {}

  TensorEntry read(const PickleValue& value) {
    const PickleValue* call = &value;
    // A parameter is a tensor and what training needs to know of it.
    if (call->is_call_of(kParameter) || call->is_call_of(kParameterWithState)) {
      call = argument(*call, 0, call->is_call_of(kParameter) ? 3 : 4);
    }
    require(call->is_call_of(kTensor), ErrorKind::unsupported,
            "{}: expected a tensor, found {}. A training checkpoint? Save the model's state_dict() "
            "alone",
            where_, describe(*call));
    TensorEntry entry;
    entry.name = name_;
    // Arguments: storage, offset, size, stride, requires_grad, backward_hooks[, metadata].
    const std::int64_t offset = extent(*argument(*call, 1, 6, 7), "offset");
    entry.shape = extents(*argument(*call, 2, 6, 7), "size");
    entry.strides = extents(*argument(*call, 3, 6, 7), "stride");
    require(entry.shape.size() == entry.strides.size(), ErrorKind::malformed,
            "{}: size [{}] and stride [{}] differ in length", where_, fmt::join(entry.shape, ", "),
            fmt::join(entry.strides, ", "));
    locate(*argument(*call, 0, 6, 7), offset, entry);
    return entry;
  }

 private:
  // Argument `index` of a call that takes from `least` to `most`.
  const PickleValue* argument(const PickleValue& call, std::size_t index, std::size_t least,
                              std::size_t most = 0) const {
    const std::vector<const PickleValue*>& arguments = call.items[1]->items;
    require(arguments.size() >= least && arguments.size() <= std::max(least, most),
            ErrorKind::malformed, "{}: {} with {} arguments; expected {}", where_, describe(call),
            arguments.size(), least);
    require(call.entries().empty() && !call.has_state, ErrorKind::unsupported,
            "{}: {} is given entries or a state; expected a plain tensor", where_, describe(call));
    return arguments[index];
  }

  std::int64_t extent(const PickleValue& value, const char* what) const {
    require(value.is(Kind::integer) && value.number >= 0, ErrorKind::malformed,
            "{}: {} must be an integer that is not negative, found {}", where_, what,
            describe(value));
    return value.number;
  }
  std::vector<std::int64_t> extents(const PickleValue& value, const char* what) const {
    const PickleValue* tuple = value.is_call_of(kSize) ? argument(value, 0, 1) : &value;
    const bool is_size = tuple->is(Kind::tuple) && tuple->items.size() <= kMaxDimensions;
    require(is_size, ErrorKind::malformed, "{}: {} must be a tuple of at most {}, found {}", where_,
            what, kMaxDimensions, describe(*tuple));
    std::vector<std::int64_t> result;
    for (const PickleValue* item : tuple->items) result.push_back(extent(*item, what));
    return result;
  }

  const Storage& storage_of(const PickleValue& type) const {
    for (const Storage& storage : kStorages) {
      if (type.is(Kind::global) && type.text == storage.global) return storage;
    }
    fail(ErrorKind::malformed, "{}: expected the type of a storage, found {}", where_,
         describe(type));
  }

  // The elements from the tensor's first to behind its last, gaps among them; nothing if a number
  // overflows. Sets `strides` to nothing if there are no gaps and the order is row-major.
  static std::optional<std::int64_t> span_of(const std::vector<std::int64_t>& shape,
                                             std::vector<std::int64_t>& strides) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) {
      if (__builtin_mul_overflow(count, extent, &count)) return std::nullopt;
    }
    bool is_contiguous = true;
    std::int64_t last = 0;
    std::int64_t step = 1;
    for (std::size_t axis = shape.size(); count > 0 && axis-- > 0;) {
      if (shape[axis] != 1 && strides[axis] != step) is_contiguous = false;
      step *= shape[axis];
      std::int64_t reach = 0;
      if (__builtin_mul_overflow(shape[axis] - 1, strides[axis], &reach) ||
          __builtin_add_overflow(last, reach, &last)) {
        return std::nullopt;
      }
    }
    if (is_contiguous) strides.clear();
    if (count == 0) return 0;
    if (__builtin_add_overflow(last, 1, &last)) return std::nullopt;
    return last;
  }

  void locate(const PickleValue& persistent, std::int64_t offset, TensorEntry& entry) const {
    const PickleValue* id = persistent.is(Kind::persistent_id) ? persistent.items[0] : nullptr;
    // ("storage", type, key, device, number of elements)
    const bool is_storage = id != nullptr && id->is(Kind::tuple) && id->items.size() == 5 &&
                            id->items[0]->is(Kind::text) && id->items[0]->text == "storage" &&
                            id->items[2]->is(Kind::text);
    require(is_storage, ErrorKind::malformed, "{}: expected a storage, found {}", where_,
            describe(persistent));
    const Storage& storage = storage_of(*id->items[1]);
    const std::string record = "data/" + id->items[2]->text;
    const std::int64_t elements = extent(*id->items[4], "number of elements of a storage");
    const ZipEntry* bytes = records_.find(record);
    require(bytes != nullptr, ErrorKind::malformed, "{}: its storage {} is not in the file", where_,
            quote(records_.folder() + record));
    std::int64_t expected_bytes = 0;
    const bool fits = !__builtin_mul_overflow(elements, storage.element_bytes, &expected_bytes) &&
                      static_cast<std::uint64_t>(expected_bytes) == bytes->end - bytes->begin;
    require(fits, ErrorKind::malformed,
            "{}: its storage {} should hold {} elements of {}, but has {} bytes", where_,
            quote(bytes->name), elements, storage.dtype, bytes->end - bytes->begin);

    const std::vector<std::int64_t> strides = entry.strides;
    const std::optional<std::int64_t> span = span_of(entry.shape, entry.strides);
    require(span.has_value() && *span <= elements && offset <= elements - *span,
            ErrorKind::malformed,
            "{}: size [{}], stride [{}] and offset {} lead out of its storage of {} elements",
            where_, fmt::join(entry.shape, ", "), fmt::join(strides, ", "), offset, elements);
    entry.dtype = storage.dtype;
    entry.begin = bytes->begin + static_cast<std::size_t>(offset * storage.element_bytes);
    entry.end = entry.begin + static_cast<std::size_t>(*span * storage.element_bytes);
  }

  const Records& records_;
  std::string where_;
  std::string name_;
};

// The keys and values of the state dict; no key twice.
std::span<const PickleValue* const> entries_of(const PickleValue& root, const std::string& where) {
  const bool is_ordered_dict = root.is_call_of(kOrderedDict) && root.items[1]->items.empty();
  require(root.is(Kind::dict) || is_ordered_dict, ErrorKind::unsupported,
          "{}: expected a state dict of tensors, found {}", where, describe(root));
  const std::span<const PickleValue* const> entries = root.entries();
  std::vector<std::string_view> names;
  for (std::size_t i = 0; i < entries.size(); i += 2) {
    require(entries[i]->is(Kind::text), ErrorKind::unsupported,
            "{}: expected the names of tensors as keys, found {}", where, describe(*entries[i]));
    names.push_back(entries[i]->text);
  }
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  require(twice == names.end(), ErrorKind::malformed, "{}: two tensors are called {}", where,
          twice == names.end() ? "" : quote(*twice));
  return entries;
}

}  // namespace

std::vector<TensorEntry> parse_torch_file(std::span<const std::byte> bytes,
                                          const std::string& file) {
  refuse_old_format(bytes, file);
  const Records records(bytes, file);
  check_version(records);
  check_byte_order(records);
  const std::string where = file + ", data.pkl";
  const Pickle pickle(records.bytes_of(*records.find("data.pkl")), where, kAllowed);
  const std::span<const PickleValue* const> entries = entries_of(pickle.root(), where);
  std::vector<TensorEntry> tensors;
  for (std::size_t i = 0; i < entries.size(); i += 2) {
    tensors.push_back(TensorReader(records, entries[i]->text).read(*entries[i + 1]));
  }
  return tensors;
}

}  // namespace clusterfusion
