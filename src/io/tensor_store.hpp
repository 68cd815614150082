// All tensors of a checkpoint folder, whether in safetensors files or in torch's, in one or
// several.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/mapped_file.hpp"
#include "io/tensor_entry.hpp"

namespace clusterfusion {

struct StoredTensor {
  std::string dtype;  // as safetensors spells it
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements; empty if row-major without gaps
  std::span<const std::byte> data;    // in the mapped file, say; tensors may share it
  std::string file;                   // its path, for messages
};

// The file that a TensorStore would first miss in `folder`, or nothing if the weights are complete.
// A link to what is gone counts as missing. Errors: malformed, for an index; those of read_file().
std::optional<std::string> missing_weights(const std::filesystem::path& folder);

// The command that writes the tensor's file again, each tensor aligned and without gaps.
std::string rewrite_command(const StoredTensor& tensor);

// Keeps the files mapped that its tensors lie in.
class TensorStore {
 public:
  // Opens the first of these in `folder`, as transformers does: model.safetensors, the files that
  // model.safetensors.index.json names, pytorch_model.bin, the files that
  // pytorch_model.bin.index.json names. Shards are plain file names: an index cannot lead out of
  // its folder (a shard itself may be a symbolic link, as in Hugging Face's cache).
  // Errors: not_found, permission_denied, io, malformed; unsupported, see the readers of files.
  explicit TensorStore(const std::filesystem::path& folder);

  using Tensors = std::map<std::string, StoredTensor, std::less<>>;
  // Of tensors that lie in memory of others; `name` stands for the folder.
  TensorStore(std::filesystem::path name, Tensors tensors)
      : folder_(std::move(name)), tensors_(std::move(tensors)) {}

  const std::filesystem::path& folder() const noexcept { return folder_; }
  // By name. Each tensor stands in exactly one file.
  const Tensors& tensors() const noexcept { return tensors_; }
  // Null if there is no such tensor.
  const StoredTensor* find(std::string_view name) const;
  // The first file of which parts could not be read any more, or null.
  const MappedFile* find_lost_file() const noexcept {
    const auto lost = std::ranges::find_if(files_, &MappedFile::has_lost_pages);
    return lost == files_.end() ? nullptr : &*lost;
  }
  // MappedFile::release() of the file in which `part` lies; nothing happens for other memory.
  void release(std::span<const std::byte> part) const noexcept {
    for (const MappedFile& file : files_) file.release(part);
  }

 private:
  using Parse = std::vector<TensorEntry> (*)(std::span<const std::byte>, const std::string&);
  void add_file(const std::filesystem::path& path, Parse parse);
  void add_shards(const std::filesystem::path& index, Parse parse);

  std::filesystem::path folder_;
  std::vector<MappedFile> files_;
  Tensors tensors_;
};

}  // namespace clusterfusion
