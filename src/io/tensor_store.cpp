#include "io/tensor_store.hpp"

#include <array>
#include <set>
#include <system_error>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "io/safetensors.hpp"
#include "io/torch_file.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxIndexBytes = 100'000'000;

// Where a checkpoint may have its weights; the first that is there counts, as for transformers.
struct WeightFiles {
  const char* file;
  const char* index;
  std::vector<TensorEntry> (*parse)(std::span<const std::byte>, const std::string&);
};

constexpr std::array<WeightFiles, 2> kWeightFiles{{
    {"model.safetensors", "model.safetensors.index.json", parse_safetensors},
    {"pytorch_model.bin", "pytorch_model.bin.index.json", parse_torch_file},
}};

void check_shard_name(std::string_view shard, const JsonValue& where) {
  const bool is_plain = !shard.empty() && shard != "." && shard != ".." &&
                        shard.find_first_of(std::string_view("/\\\0", 3)) == shard.npos;
  if (!is_plain) where.fail_expected("the plain name of a file in the same folder");
}

// Tensor -> shard, as the index promises it.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& index) {
  const JsonDocument document(read_file(index, kMaxIndexBytes), index.string());
  const JsonObject root(document.root());
  const JsonObject entries(root.at("weight_map"));
  std::map<std::string, std::string> weight_map;
  for (const JsonObject::Member& member : entries.members()) {
    const JsonValue value = entries.value_of(member);
    const std::string_view shard = value.string();
    check_shard_name(shard, value);
    weight_map.emplace(member.first, shard);
  }
  require(!weight_map.empty(), ErrorKind::malformed, "{}: \"weight_map\" is empty", index.string());
  return weight_map;
}

}  // namespace

std::optional<std::string> missing_weights(const std::filesystem::path& folder) {
  std::error_code error;
  for (const WeightFiles& kind : kWeightFiles) {
    if (std::filesystem::exists(folder / kind.file, error)) return std::nullopt;
    if (is_there(folder / kind.file)) return kind.file;
    if (!std::filesystem::exists(folder / kind.index, error)) continue;
    for (const auto& [tensor, shard] : read_weight_map(folder / kind.index)) {
      if (!std::filesystem::exists(folder / shard, error)) return shard;
    }
    return std::nullopt;
  }
  return kWeightFiles[0].file;
}

std::string rewrite_command(const StoredTensor& tensor) {
  if (tensor.file.ends_with(".bin")) {
    return fmt::format(
        "python -c \"import torch; torch.save({{k: v.contiguous() for k, v in torch.load('{}', "
        "map_location='cpu', weights_only=True).items()}}, 'NEW.bin')\"",
        tensor.file);
  }
  return fmt::format(
      "python -c \"from safetensors.torch import load_file, save_file; save_file(load_file('{}'), "
      "'NEW.safetensors', {{'format': 'pt'}})\"",
      tensor.file);
}

TensorStore::TensorStore(const std::filesystem::path& folder) : folder_(folder) {
  for (const WeightFiles& kind : kWeightFiles) {
    if (is_there(folder / kind.file)) {
      add_file(folder / kind.file, kind.parse);
      return;
    }
    if (is_there(folder / kind.index)) {
      add_shards(folder / kind.index, kind.parse);
      return;
    }
  }
  fail(ErrorKind::not_found,
       "no weights in {}: expected model.safetensors, model.safetensors.index.json, "
       "pytorch_model.bin or pytorch_model.bin.index.json",
       folder.string());
}

const StoredTensor* TensorStore::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void TensorStore::add_file(const std::filesystem::path& path, Parse parse) {
  const MappedFile& file = files_.emplace_back(path);
  const std::string file_name = path.string();
  for (TensorEntry& tensor : parse(file.bytes(), file_name)) {
    const auto data = file.bytes().subspan(tensor.begin, tensor.end - tensor.begin);
    const auto [position, is_new] = tensors_.try_emplace(
        std::move(tensor.name), StoredTensor{std::move(tensor.dtype), std::move(tensor.shape),
                                             std::move(tensor.strides), data, file_name});
    require(is_new, ErrorKind::malformed, "tensor {} is in two shards: {} and {}",
            quote(position->first), position->second.file, file_name);
  }
}

void TensorStore::add_shards(const std::filesystem::path& index, Parse parse) {
  const std::map<std::string, std::string> weight_map = read_weight_map(index);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weight_map) shards.insert(shard);
  for (const std::string& shard : shards) {
    const std::filesystem::path path = index.parent_path() / shard;
    require(is_there(path), ErrorKind::not_found,
            "{} names the shard {}, but there is no such file", index.string(), path.string());
    add_file(path, parse);
  }
  for (const auto& [tensor, shard] : weight_map) {
    const StoredTensor* stored = find(tensor);
    const std::string expected = (index.parent_path() / shard).string();
    require(stored != nullptr, ErrorKind::malformed,
            "{} promises tensor {} in {}, but it is in none of the shards", index.string(),
            quote(tensor), expected);
    require(stored->file == expected, ErrorKind::malformed,
            "{} promises tensor {} in {}, but it is in {}", index.string(), quote(tensor), expected,
            stored->file);
  }
  for (const auto& [tensor, stored] : tensors_) {
    require(weight_map.contains(tensor), ErrorKind::malformed,
            "{} holds tensor {}, which is not in the weight_map of {}", stored.file, quote(tensor),
            index.string());
  }
}

}  // namespace clusterfusion
