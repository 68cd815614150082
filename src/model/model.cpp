#include "clusterfusion/model.hpp"

#include <fmt/format.h>

#include <system_error>
#include <utility>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "clusterfusion/hub.hpp"
#include "io/json.hpp"
#include "io/mapped_file.hpp"
#include "io/tensor_store.hpp"
#include "model/config_reader.hpp"
#include "model/decoded_tensors.hpp"
#include "model/intact.hpp"
#include "model/non_finite.hpp"
#include "model/weight_binding.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxConfigBytes = 16 << 20;
constexpr const char* kGenerationConfig = "generation_config.json";

// "3" of a vector, "1, 3" of a matrix.
std::string index_text(const DLTensor& tensor, std::int64_t index) {
  if (tensor.ndim == 1) return fmt::format("{}", index);
  return fmt::format("{}, {}", index / tensor.shape[1], index % tensor.shape[1]);
}

// Of tensors in files or in memory.
class StoredModel : public Model {
 public:
  StoredModel(TensorStore store, ModelConfig config) : store_(std::move(store)) {
    folder_ = store_.folder();
    config_ = std::move(config);
    BoundWeights bound = bind_weights(store_, config_, shapes_);
    weights_ = std::move(bound.weights);
    tensors_ = std::move(bound.tensors);
    copies_ = std::move(bound.copies);
    warnings_ = std::move(bound.warnings);
    warn_of_window();
    require_intact(*this);
  }

  std::optional<std::string> find_non_finite() const override {
    for (const NamedTensor& tensor : tensors_) {
      if (const std::optional<NonFinite> found = first_non_finite(tensor.view)) {
        return fmt::format("tensor {} [{}] = {} in {}", tensor.name,
                           index_text(tensor.view, found->index), found->value, tensor.file);
      }
    }
    return std::nullopt;
  }

  std::optional<std::string> find_lost_file() const override {
    const MappedFile* lost = store_.find_lost_file();
    return lost == nullptr ? std::nullopt : std::optional(lost->path().string());
  }

  void release(std::span<const std::byte> bytes) const noexcept override { store_.release(bytes); }

 private:
  void warn_of_window() {
    if (config_.sliding_window == 0) return;
    warnings_.push_back(
        fmt::format("{}: the model's attention slides over the last {} positions "
                    "(\"sliding_window\" of config.json), which is not supported: contexts end at "
                    "{} positions, up to where it makes no difference",
                    folder_.string(), config_.sliding_window, config_.max_positions));
  }

  TensorStore store_;
  ShapeStorage shapes_;
  std::vector<NamedTensor> tensors_;
  TensorCopies copies_;
};

class MappedModel final : public StoredModel {
 public:
  MappedModel(const std::filesystem::path& folder, ModelConfig config)
      : StoredModel(TensorStore(folder), std::move(config)) {}

  GenerationConfig generation_config() const override {
    const std::filesystem::path path = folder_ / kGenerationConfig;
    if (!is_there(path)) return {};
    return parse_generation_config(read_file(path, kMaxConfigBytes), path.string());
  }
};

// Where a text of a model in memory would stand in a checkpoint, for messages.
std::string place_in(const ModelInMemory& given, const char* file) {
  return fmt::format("{} of {}", file, given.name);
}

ModelConfig read_config(const ModelInMemory& given) {
  ModelConfig config = parse_config(given.config, place_in(given, "config.json"));
  if (!given.generation_config.empty()) {
    apply_generation_config(given.generation_config, place_in(given, kGenerationConfig), config);
  }
  return config;
}

// As safetensors spells it, or what no checkpoint has.
std::string spelling_of(const DLTensor& tensor) {
  const std::optional<DType> known = dtype_of(tensor);
  if (!known) {
    return fmt::format("{} of {} bits", tensor.dtype.code == kDLFloat ? "float" : "integer",
                       static_cast<int>(tensor.dtype.bits));
  }
  return *known == DType::float16 ? "F16" : *known == DType::bfloat16 ? "BF16" : "F32";
}

TensorStore store_of(const ModelInMemory& given) {
  TensorStore::Tensors tensors;
  for (const auto& [name, view] : given.tensors) {
    require(view.device.device_type == kDLCPU, ErrorKind::unsupported,
            "{}: tensor {} is not in the memory of the CPU (DLPack device type {}); copy it there",
            given.name, quote(name), static_cast<int>(view.device.device_type));
    require(is_contiguous(view), ErrorKind::unsupported,
            "{}: tensor {} is not contiguous; make it so (tensor.contiguous())", given.name,
            quote(name));
    const std::span data(data_of(view), static_cast<std::size_t>(num_bytes(view)));
    const bool is_new =
        tensors
            .try_emplace(
                name,
                StoredTensor{
                    spelling_of(view), {view.shape, view.shape + view.ndim}, {}, data, given.name})
            .second;
    require(is_new, ErrorKind::malformed, "{}: two tensors are named {}", given.name, quote(name));
  }
  return {given.name, std::move(tensors)};
}

class MemoryModel final : public StoredModel {
 public:
  explicit MemoryModel(ModelInMemory given)
      : StoredModel(store_of(given), read_config(given)), given_(std::move(given)) {}

  GenerationConfig generation_config() const override {
    if (given_.generation_config.empty()) return {};
    return parse_generation_config(given_.generation_config, place_in(given_, kGenerationConfig));
  }

 private:
  const ModelInMemory given_;
};

void check_folder(const std::filesystem::path& folder) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(folder, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    fail(ErrorKind::not_found, "no such folder: {}", folder.string());
  }
  require(error != std::errc::permission_denied, ErrorKind::permission_denied,
          "cannot look at {}: {}", folder.string(), error.message());
  require(!error, ErrorKind::io, "cannot look at {}: {}", folder.string(), error.message());
  require(std::filesystem::is_directory(status), ErrorKind::not_found,
          "{} is a file; expected a checkpoint folder with config.json and weights",
          folder.string());
}

ModelConfig read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  require(is_there(path), ErrorKind::not_found,
          "no config.json in {}: expected a checkpoint folder in Hugging Face's layout",
          folder.string());
  ModelConfig config = parse_config(read_file(path, kMaxConfigBytes), path.string());
  const std::filesystem::path generation = folder / kGenerationConfig;
  if (is_there(generation)) {
    apply_generation_config(read_file(generation, kMaxConfigBytes), generation.string(), config);
  }
  return config;
}

// The sum of measure(tensor) over all that a decode step reads, but for the embedding's row.
template <typename Measure>
std::int64_t sum_behind_embedding(const ModelWeights& weights, const Measure& measure) {
  std::int64_t sum = 0;
  for_each_decoded_tensor(weights, [&](const DLTensor& tensor) { sum += measure(tensor); });
  return sum;
}

template <typename Measure>
std::int64_t sum_all(const ModelWeights& weights, bool tied, const Measure& measure) {
  return sum_behind_embedding(weights, measure) + (tied ? 0 : measure(weights.embedding));
}

}  // namespace

std::shared_ptr<const Model> Model::open(const std::filesystem::path& name,
                                         const std::string& revision) {
  const std::filesystem::path folder = find_checkpoint(name, revision);
  check_folder(folder);
  return std::make_shared<MappedModel>(folder, read_config(folder));
}

std::shared_ptr<const Model> Model::from_memory(ModelInMemory given) {
  return std::make_shared<MemoryModel>(std::move(given));
}

std::int64_t Model::num_parameters() const noexcept {
  return sum_all(weights_, config_.tied_embeddings, num_elements);
}

std::int64_t Model::bytes_per_token() const noexcept {
  const std::int64_t embedding_row = num_bytes(weights_.embedding) / config_.vocab_size;
  return sum_behind_embedding(weights_, num_bytes) + embedding_row;
}

std::int64_t Model::total_bytes() const noexcept {
  return sum_all(weights_, config_.tied_embeddings, num_bytes);
}

}  // namespace clusterfusion
