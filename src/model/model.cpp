#include "clusterfusion/model.hpp"

#include <fmt/format.h>

#include <system_error>
#include <utility>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "clusterfusion/hub.hpp"
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

class MappedModel : public Model {
 public:
  MappedModel(const std::filesystem::path& folder, ModelConfig config) : store_(folder) {
    folder_ = folder;
    config_ = std::move(config);
    BoundWeights bound = bind_weights(store_, config_, shapes_);
    weights_ = std::move(bound.weights);
    tensors_ = std::move(bound.tensors);
    copies_ = std::move(bound.copies);
    warnings_ = std::move(bound.warnings);
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

  GenerationConfig generation_config() const override {
    const std::filesystem::path path = folder_ / kGenerationConfig;
    if (!is_there(path)) return {};
    return parse_generation_config(read_file(path, kMaxConfigBytes), path.string());
  }

  std::optional<std::string> find_lost_file() const override {
    const MappedFile* lost = store_.find_lost_file();
    return lost == nullptr ? std::nullopt : std::optional(lost->path().string());
  }

  void release(std::span<const std::byte> bytes) const noexcept override { store_.release(bytes); }

 private:
  TensorStore store_;
  ShapeStorage shapes_;
  std::vector<NamedTensor> tensors_;
  TensorCopies copies_;
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
