// All tensors of a checkpoint folder, whether in one safetensors file or in several.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/mapped_file.hpp"

namespace clusterfusion {

struct StoredTensor {
  std::string dtype;  // as safetensors spells it
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;  // in the mapped file
  std::string file;                 // its path, for messages
};

// Keeps the files mapped that its tensors lie in.
class TensorStore {
 public:
  // Opens model.safetensors in `folder`; if there is none, the files that
  // model.safetensors.index.json names. Shards are plain file names: an index cannot lead out of
  // its folder (a shard itself may be a symbolic link, as in Hugging Face's cache).
  // Errors: not_found, permission_denied, io, malformed; unsupported if there are only PyTorch
  // pickles.
  explicit TensorStore(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const noexcept { return folder_; }
  // By name. Each tensor stands in exactly one file.
  const std::map<std::string, StoredTensor, std::less<>>& tensors() const noexcept {
    return tensors_;
  }
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
  void add_file(const std::filesystem::path& path);
  void add_shards(const std::filesystem::path& index);

  std::filesystem::path folder_;
  std::vector<MappedFile> files_;
  std::map<std::string, StoredTensor, std::less<>> tensors_;
};

}  // namespace clusterfusion
