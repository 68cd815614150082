// The layer calls on the GPU with options that GPT-NeoX's layer does not need (grouped heads, other
// norms and MLPs, pages, several rows) against the CPU's results, which the Python tests hold to
// float64.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend.hpp"
#include "backend/cuda/memory.hpp"
#include "held_sms.hpp"
#include "ops/layer_fixture.hpp"
#include "recorded_bits.hpp"

namespace clusterfusion::test {
namespace {

using cuda::check;
using cuda::DeviceMemory;

struct Kind {
  std::int64_t hidden = 64, heads = 4, kv_heads = 2, intermediate = 96, rotary_dim = 8;
  std::int64_t head_dim = 0;  // 0: hidden / heads
  DType dtype = DType::float16;
  bool interleaved = false;
  bool rms = false, gated = false, sequential = false, head_norms = false;
  bool biases = true;
  Activation activation = Activation::gelu_erf;

  std::int64_t dim() const { return head_dim == 0 ? hidden / heads : head_dim; }
  std::int64_t kv_size() const { return kv_heads * dim(); }
  std::int64_t qkv_size() const { return heads * dim() + 2 * kv_size(); }
};

Kind llama(Kind kind) {
  kind.rms = kind.gated = kind.sequential = true;
  kind.biases = false;
  kind.activation = Activation::silu;
  return kind;
}

// A layer that one kernel computes where it has one row.
Kind streamed(std::int64_t dim, std::int64_t heads) {
  return {.hidden = dim * heads,
          .heads = heads,
          .kv_heads = heads,
          .intermediate = 160,
          .rotary_dim = dim / 4,
          .interleaved = true};
}

// Where rows are, and how their caches lie.
struct Rows {
  std::vector<std::int64_t> positions = {33};
  std::int64_t page_size = 0;  // 0: a cache of rows, for one row
  // The order in memory of pages, cache (keys or values), slots of a page, heads, dimensions.
  std::string order = "pcshd";
  std::int64_t gap = 0;        // elements behind each head, so that heads are not aligned
  std::int64_t num_pages = 0;  // 0: some more than the rows need

  std::int64_t count() const { return static_cast<std::int64_t>(positions.size()); }
  std::int64_t width() const {
    return *std::max_element(positions.begin(), positions.end()) / page_size + 2;
  }
  std::int64_t pages() const { return num_pages == 0 ? count() * width() + 3 : num_pages; }
};

// A tensor's place on either device, with shape and strides that live as long.
struct View {
  std::vector<std::int64_t> shape, strides;
  DLDataType dtype{};
  std::int64_t offset = 0;  // bytes into its memory

  DLTensor at(void* memory, DLDevice device) {
    DLTensor tensor{};
    tensor.data = static_cast<std::byte*>(memory) + offset;
    tensor.device = device;
    tensor.ndim = static_cast<std::int32_t>(shape.size());
    tensor.dtype = dtype;
    tensor.shape = shape.data();
    tensor.strides = strides.empty() ? nullptr : strides.data();
    return tensor;
  }
};

constexpr DLDataType kInt = {kDLInt, 32, 1}, kFloat = {kDLFloat, 32, 1};
constexpr const char* kLayerResults[] = {"output", "k_new", "v_new"};
constexpr const char* kPartResults[] = {"attn_output", "mlp_intermediate", "k_new", "v_new"};

enum class Call { layer, parts };

// Random tensors of a layer, in host memory and on the GPU.
class OptionLayer {
 public:
  OptionLayer(const Kind& kind, const Rows& rows, unsigned seed = 1)
      : kind_(kind), rows_(rows), random_(seed) {
    make_weights();
    make_rows();
    if (rows.page_size == 0)
      make_caches_of_rows();
    else
      make_pages();
    for (auto& [name, memory] : host_)
      device_.emplace(name, DeviceMemory(static_cast<std::int64_t>(memory.size()), "tests"));
    upload();
  }

  void run(Call call, bool on_gpu, cudaStream_t stream = nullptr) {
    const auto t = tensors(on_gpu);
    const auto tensor = [&](const char* name) { return find(name, on_gpu); };
    if (call == Call::layer) {
      return ops::decoder_layer(t, tensor("mlp_down_weight"), tensor("mlp_down_bias"), options(),
                                {tensor("output"), tensor("k_new"), tensor("v_new")},
                                ops::DecoderLayerVariant::fused, stream);
    }
    ops::attention_mlp_up(
        t, options(),
        {tensor("attn_output"), tensor("mlp_intermediate"), tensor("k_new"), tensor("v_new")},
        stream);
    ops::mlp_down({t.input, tensor("attn_output"), tensor("mlp_intermediate"),
                   tensor("mlp_down_weight"), tensor("mlp_down_bias")},
                  tensor("output"), stream);
  }

  // The host's tensors to the GPU. Each byte of the results is `results` then: 0xff makes NaN, so
  // that one that nobody writes is seen.
  void upload(int results = 0xff) {
    for (const auto& [name, memory] : host_) upload(name);
    for (const char* name : {"attn_output", "mlp_intermediate", "output", "k_new", "v_new"})
      check(cudaMemset(device_.at(name).as<>(), results, host_.at(name).size()), "forgetting");
    // Streams that do not wait for the default one may come next.
    check(cudaDeviceSynchronize(), "waiting for the tensors");
  }
  void upload(const std::string& name) {
    const auto& memory = host_.at(name);
    check(cudaMemcpy(device_.at(name).as<>(), memory.data(), memory.size(), cudaMemcpyHostToDevice),
          "writing a tensor");
  }
  std::vector<std::byte> download(const std::string& name) const {
    std::vector<std::byte> bytes(host_.at(name).size());
    check(cudaMemcpy(bytes.data(), device_.at(name).as<>(), bytes.size(), cudaMemcpyDeviceToHost),
          "reading a tensor");
    return bytes;
  }
  std::vector<std::byte>& host(const std::string& name) { return host_.at(name); }
  std::int32_t& position(std::int64_t row) {
    return reinterpret_cast<std::int32_t*>(host_.at("positions").data())[row];
  }
  std::int32_t& page(std::int64_t row, std::int64_t index) {
    return reinterpret_cast<std::int32_t*>(
        host_.at("block_table").data())[row * rows_.width() + index];
  }
  // Row `row` of a result.
  std::vector<std::byte> row_of(const std::vector<std::byte>& result, std::int64_t row) const {
    const auto size = static_cast<std::ptrdiff_t>(result.size()) / rows_.count();
    return {result.begin() + row * size, result.begin() + (row + 1) * size};
  }
  // The same layer for one of its rows alone: makes that row the only one.
  void copy_row_from(const OptionLayer& all, std::int64_t row) {
    for (const auto& [name, memory] : all.host_) {
      const bool by_row = name == "input" || name == "cos" || name == "sin" ||
                          name == "positions" || name == "block_table";
      const auto found = host_.find(name);
      if (found == host_.end()) continue;
      auto& mine = found->second;
      if (by_row)
        std::copy_n(memory.begin() + row * static_cast<std::ptrdiff_t>(mine.size()), mine.size(),
                    mine.begin());
      else if (memory.size() == mine.size())
        mine = memory;
    }
    upload();
  }

  // Fills caches of rows with what the first row of another layer has in its pages, up to its
  // position.
  void gather_pages_of(OptionLayer& other) {
    const std::vector<std::int64_t>& strides = other.views_.at("k_cache").strides;
    for (const char* name : {"k_cache", "v_cache"}) {
      const std::byte* from = other.host_.at("kv").data() + other.views_.at(name).offset;
      for (std::int64_t position = 0; position <= rows_.positions[0]; ++position)
        for (std::int64_t head = 0; head < kind_.kv_heads; ++head) {
          const std::int64_t size = other.rows_.page_size;
          const std::int64_t element = other.page(0, position / size) * strides[0] +
                                       position % size * strides[1] + head * strides[2];
          std::memcpy(host_.at(name).data() + (position * kind_.kv_size() + head * kind_.dim()) * 2,
                      from + element * 2, static_cast<std::size_t>(kind_.dim() * 2));
        }
    }
    upload();
  }

  const Kind& kind() const { return kind_; }
  const Rows& rows() const { return rows_; }

 private:
  void add(const std::string& name, DLDataType dtype, std::vector<std::int64_t> shape,
           float deviation, float mean = 0) {
    OwnedTensor tensor(dtype, shape);
    std::normal_distribution<float> normal(mean, deviation);
    const std::int64_t drawn = std::min<std::int64_t>(tensor.count(), 1048573);
    for (std::int64_t i = 0; i < drawn; ++i) tensor.set(i, normal(random_));
    tensor.repeat(drawn);
    host_[name] = tensor.bytes();
    views_[name] = {std::move(shape), {}, dtype, 0};
  }
  void add_matrix(const std::string& weight, const char* bias, std::int64_t out, std::int64_t in) {
    const DLDataType narrow_type = to_dl(kind_.dtype);
    add(weight, narrow_type, {out, in}, 1.0f / std::sqrt(static_cast<float>(in)));
    if (kind_.biases) add(bias, narrow_type, {out}, 0.2f);
  }
  void add_norm(const std::string& weight, const char* bias, std::int64_t size) {
    add(weight, to_dl(kind_.dtype), {size}, 0.2f, 1);
    if (bias != nullptr && !kind_.rms) add(bias, to_dl(kind_.dtype), {size}, 0.1f);
  }

  void make_weights() {
    const Kind& k = kind_;
    add_matrix("weight_qkv", "bias_qkv", k.qkv_size(), k.hidden);
    add_matrix("weight_o", "bias_o", k.hidden, k.heads * k.dim());
    add_matrix("mlp_up_weight", "mlp_up_bias", (k.gated ? 2 : 1) * k.intermediate, k.hidden);
    add_matrix("mlp_down_weight", "mlp_down_bias", k.hidden, k.intermediate);
    add_norm("ln_weight", "ln_bias", k.hidden);
    add_norm("post_ln_weight", "post_ln_bias", k.hidden);
    if (!k.head_norms) return;
    add_norm("q_norm_weight", nullptr, k.dim());
    add_norm("k_norm_weight", nullptr, k.dim());
  }

  // What there is of each row.
  void make_rows() {
    const DLDataType narrow_type = to_dl(kind_.dtype);
    const std::int64_t rows = rows_.count();
    add("input", narrow_type, {rows, kind_.hidden}, 1);
    for (const char* name : {"cos", "sin"}) {
      add(name, kFloat, {rows, kind_.rotary_dim}, 1);
      if (rows == 1) views_[name].shape = {kind_.rotary_dim};
    }
    add("attn_output", narrow_type, {rows, kind_.hidden}, 0);
    add("output", narrow_type, {rows, kind_.hidden}, 0);
    add("mlp_intermediate", narrow_type, {rows, kind_.intermediate}, 0);
    for (const char* name : {"k_new", "v_new"})
      add(name, narrow_type, {rows, kind_.kv_heads, kind_.dim()}, 0);
    host_["positions"].resize(static_cast<std::size_t>(rows) * sizeof(std::int32_t));
    views_["positions"] = {{rows}, {}, kInt, 0};
    for (std::int64_t row = 0; row < rows; ++row)
      position(row) = static_cast<std::int32_t>(rows_.positions[static_cast<std::size_t>(row)]);
  }

  void make_caches_of_rows() {
    for (const char* name : {"k_cache", "v_cache"})
      add(name, to_dl(kind_.dtype), {rows_.positions[0] + 9, kind_.kv_size()}, 1);
  }

  // Keys and values in one allocation, and a table of pages that lie anywhere in it.
  void make_pages() {
    const std::map<char, std::int64_t> sizes = {{'p', rows_.pages()},
                                                {'c', 2},
                                                {'s', rows_.page_size},
                                                {'h', kind_.kv_heads},
                                                {'d', kind_.dim() + rows_.gap}};
    std::map<char, std::int64_t> strides;
    std::int64_t elements = 1;
    for (auto axis = rows_.order.rbegin(); axis != rows_.order.rend(); ++axis) {
      strides[*axis] = elements;
      elements *= sizes.at(*axis);
    }
    add("kv", to_dl(kind_.dtype), {elements + 8}, 1);
    const std::vector<std::int64_t> shape = {rows_.pages(), rows_.page_size, kind_.kv_heads,
                                             kind_.dim()};
    const std::vector<std::int64_t> of_view = {strides['p'], strides['s'], strides['h'],
                                               strides['d']};
    // Each cache begins at a multiple of 16 bytes, whatever its heads do.
    views_["k_cache"] = {shape, of_view, to_dl(kind_.dtype), 0};
    views_["v_cache"] = {shape, of_view, to_dl(kind_.dtype), strides['c'] * 2};

    std::vector<std::int32_t> pages(static_cast<std::size_t>(rows_.pages()));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random_);
    const std::int64_t rows = rows_.count(), width = rows_.width();
    host_["block_table"].resize(static_cast<std::size_t>(rows * width) * sizeof(std::int32_t));
    views_["block_table"] = {{rows, width}, {}, kInt, 0};
    // What is behind a row's pages is never looked at.
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t i = 0; i < width; ++i)
        page(row, i) = i <= position(row) / rows_.page_size
                           ? pages[static_cast<std::size_t>(row * width + i)]
                           : std::numeric_limits<std::int32_t>::max();
  }

  DLTensor find(const std::string& name, bool on_gpu) {
    const auto view = views_.find(name);
    if (view == views_.end()) return {};
    const bool in_pages = rows_.page_size != 0 && (name == "k_cache" || name == "v_cache");
    const std::string memory = in_pages ? "kv" : name;
    if (on_gpu) return view->second.at(device_.at(memory).as<>(), {kDLCUDA, 0});
    return view->second.at(host_.at(memory).data(), {kDLCPU, 0});
  }

  ops::LayerTensors tensors(bool on_gpu) {
    const auto tensor = [&](const char* name) { return find(name, on_gpu); };
    ops::LayerTensors t;
    t.input = tensor("input");
    t.weight_qkv = tensor("weight_qkv");
    t.bias_qkv = tensor("bias_qkv");
    t.weight_o = tensor("weight_o");
    t.bias_o = tensor("bias_o");
    t.k_cache = tensor("k_cache");
    t.v_cache = tensor("v_cache");
    t.ln_weight = tensor("ln_weight");
    t.ln_bias = tensor("ln_bias");
    t.cos = tensor("cos");
    t.sin = tensor("sin");
    t.post_ln_weight = tensor("post_ln_weight");
    t.post_ln_bias = tensor("post_ln_bias");
    t.mlp_up_weight = tensor("mlp_up_weight");
    t.mlp_up_bias = tensor("mlp_up_bias");
    t.current_seq_len = {0, tensor("positions")};
    t.block_table = tensor("block_table");
    t.q_norm_weight = tensor("q_norm_weight");
    t.k_norm_weight = tensor("k_norm_weight");
    return t;
  }

  ops::LayerOptions options() const {
    ops::LayerOptions options;
    options.num_heads = kind_.heads;
    if (kind_.head_dim != 0) options.head_dim = kind_.head_dim;
    options.num_kv_heads = kind_.kv_heads;
    options.rotary_dim = kind_.rotary_dim;
    options.qkv_weight_interleaved = kind_.interleaved;
    options.norm = kind_.rms ? NormKind::rms_norm : NormKind::layer_norm;
    options.gated = kind_.gated;
    options.parallel_residual = !kind_.sequential;
    options.activation = kind_.activation;
    return options;
  }

  Kind kind_;
  Rows rows_;
  std::mt19937 random_;
  std::map<std::string, std::vector<std::byte>> host_;
  std::map<std::string, DeviceMemory> device_;
  std::map<std::string, View> views_;
};

std::vector<double> decoded(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<double> values;
  for (std::size_t i = 0; i < bytes.size(); i += 2) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i, 2);
    values.push_back(widen(bits, dtype));
  }
  return values;
}

// Both round results, keys and values to 16 bits; the streaming kernel what enters a product too.
void expect_close(const std::vector<std::byte>& found, const std::vector<std::byte>& expected,
                  DType dtype, const std::string& name) {
  const std::vector<double> ours = decoded(found, dtype), theirs = decoded(expected, dtype);
  ASSERT_EQ(ours.size(), theirs.size()) << name;
  double error = 0, size = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    ASSERT_TRUE(std::isfinite(ours[i])) << name << ": element " << i << " is not finite";
    error += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
    size += theirs[i] * theirs[i];
  }
  EXPECT_LE(std::sqrt(error / size), dtype == DType::float16 ? 2e-3 : 1.6e-2) << name;
}

bool all_nan(const std::vector<std::byte>& bytes) {
  const std::vector<double> values = decoded(bytes, DType::float16);
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isnan(v); });
}

std::vector<const char*> caches_of(const Rows& rows) {
  if (rows.page_size != 0) return {"kv"};
  return {"k_cache", "v_cache"};
}

// Where the CPU has written nothing, the GPU has not either. Some of what it has written is as it
// was, by chance, and may be a rounding away.
void expect_no_other_writes(const std::vector<std::byte>& found,
                            const std::vector<std::byte>& expected,
                            const std::vector<std::byte>& before, DType dtype) {
  const auto ours = decoded(found, dtype), theirs = decoded(expected, dtype);
  const auto old = decoded(before, dtype);
  int others = 0;
  for (std::size_t i = 0; i < old.size(); ++i)
    others += theirs[i] == old[i] && std::fabs(ours[i] - old[i]) > 0.02 * (1 + std::fabs(old[i]));
  EXPECT_EQ(others, 0) << "elements of the cache that are not of the new keys and values";
}

// Results and caches of both calls, on the GPU beside the CPU.
void expect_as_on_the_cpu(OptionLayer& layer) {
  for (const Call call : {Call::layer, Call::parts}) {
    SCOPED_TRACE(call == Call::layer ? "decoder_layer" : "attention_mlp_up and mlp_down");
    layer.upload();
    std::map<std::string, std::vector<std::byte>> before;
    for (const char* cache : caches_of(layer.rows())) before[cache] = layer.host(cache);
    layer.run(call, /*on_gpu=*/true);
    check(cudaDeviceSynchronize(), "running a layer");
    layer.run(call, /*on_gpu=*/false);
    const DType dtype = layer.kind().dtype;
    for (const char* name : kLayerResults)
      expect_close(layer.download(name), layer.host(name), dtype, name);
    if (call == Call::parts)
      for (const char* name : kPartResults)
        expect_close(layer.download(name), layer.host(name), dtype, name);
    for (auto& [cache, bytes] : before) {
      const auto found = layer.download(cache);
      expect_close(found, layer.host(cache), dtype, cache);
      expect_no_other_writes(found, layer.host(cache), bytes, dtype);
      layer.host(cache) = bytes;
    }
  }
}

struct OptionCase {
  std::string name;
  Kind kind;
  Rows rows;
};
std::ostream& operator<<(std::ostream& out, const OptionCase& c) { return out << c.name; }

// Groups of 1, 2, 3, 8 and all heads, in both orders of rows, at every head size that matters.
void add_groups(std::vector<OptionCase>& cases) {
  for (const std::int64_t dim : {11, 64, 80, 96, 128, 256})
    for (const auto& [heads, kv_heads] : std::initializer_list<std::pair<int, int>>{
             {6, 6}, {6, 3}, {6, 2}, {8, 1}, {16, 2}, {6, 1}})
      for (const bool interleaved : {true, false}) {
        Kind kind;
        kind.hidden = dim * heads;
        kind.heads = heads;
        kind.kv_heads = kv_heads;
        kind.rotary_dim = dim / 2 / 2 * 2;
        kind.interleaved = interleaved;
        kind.dtype = dim == 96 ? DType::bfloat16 : DType::float16;
        cases.push_back({"head_" + std::to_string(dim) + "_of_" + std::to_string(heads) + "_" +
                             std::to_string(kv_heads) + (interleaved ? "_interleaved" : ""),
                         kind,
                         {{200}}});
      }
}

// One option after the other, and all together.
void add_options(std::vector<OptionCase>& cases) {
  const auto add = [&](const char* name, auto&& choose) {
    Kind kind{.hidden = 192, .heads = 6, .intermediate = 160, .rotary_dim = 16};
    choose(kind);
    cases.push_back({name, kind, {{70}}});
    cases.push_back({std::string(name) + "_rows", kind, {{70, 3, 15, 16, 0}, 16}});
  };
  add("rms", [](Kind& k) { k.rms = true; });
  add("gated", [](Kind& k) { k.gated = true; });
  add("sequential", [](Kind& k) { k.sequential = true; });
  add("sequential_relu", [](Kind& k) {
    k.sequential = true;
    k.activation = Activation::relu;
  });
  add("head_norms", [](Kind& k) { k.head_norms = true; });
  add("without_biases", [](Kind& k) { k.biases = false; });
  add("head_dim", [](Kind& k) { k.head_dim = 48; });
  add("llama", [](Kind& k) { k = llama(k); });
  add("qwen3", [](Kind& k) {
    k = llama(k);
    k.head_norms = true;
    k.head_dim = 64;
    k.rotary_dim = 64;
  });
  add("odd", [](Kind& k) {
    k = llama(k);
    k.hidden = 66;
    k.intermediate = 17;
    k.rotary_dim = 4;
    k.head_norms = true;
  });
}

// Pages of every size, in any strides; 1 to 16 rows.
void add_pages(std::vector<OptionCase>& cases) {
  Kind kind{.hidden = 256, .heads = 8, .kv_heads = 2, .intermediate = 100, .rotary_dim = 32};
  const std::vector<std::int64_t> positions = {0, 300, 63, 64, 15, 16, 129};
  for (const std::int64_t size : {16, 32, 64}) {
    const std::string pages = "pages_of_" + std::to_string(size);
    cases.push_back({pages, kind, {positions, size}});
    cases.push_back({pages + "_one_row", kind, {{333}, size}});
    cases.push_back({pages + "_all_heads_rows", streamed(32, 8), {positions, size}});
    for (const std::int64_t dim : {32, 64, 80, 96, 128, 224, 256})
      for (const std::int64_t position : {0, 70, 1300})
        cases.push_back(
            {pages + "_streamed_" + std::to_string(dim) + "_at_" + std::to_string(position),
             streamed(dim, 4),
             {{position}, size}});
  }
  for (const char* order : {"cpshd", "pschd", "pshcd", "pchsd", "hcpsd", "phscd"})
    cases.push_back({std::string("streamed_order_") + order, streamed(64, 4), {{333}, 16, order}});
  cases.push_back({"streamed_gaps_of_8", streamed(64, 4), {{333}, 16, "pcshd", 8}});
  cases.push_back({"streamed_gaps_of_1", streamed(64, 4), {{333}, 16, "cpshd", 1}});
  Kind without_biases = streamed(64, 4);
  without_biases.biases = false;
  cases.push_back({"streamed_without_biases", without_biases, {{333}}});
  cases.push_back({"streamed_without_biases_in_pages", without_biases, {{333}, 32}});
  for (const char* order : {"cpshd", "pschd", "pshcd", "pchsd", "hcpsd", "phscd"})
    cases.push_back({std::string("order_") + order, kind, {positions, 16, order}});
  // Heads that are not aligned: in pages, so that each cache begins at a multiple of 16 bytes.
  cases.push_back({"gaps_of_8", kind, {positions, 32, "pcshd", 8}});
  cases.push_back({"gaps_of_1", kind, {positions, 32, "cpshd", 1}});
  for (std::int64_t rows = 1; rows <= 16; ++rows) {
    Rows many{{}, 16};
    for (std::int64_t row = 0; row < rows; ++row) many.positions.push_back(row * 37 % 110);
    cases.push_back({"rows_" + std::to_string(rows), llama(kind), many});
  }
}

std::vector<OptionCase> option_cases() {
  std::vector<OptionCase> cases;
  add_groups(cases);
  add_options(cases);
  add_pages(cases);
  cases.push_back({"llama_1b",
                   llama({.hidden = 2048,
                          .heads = 32,
                          .kv_heads = 8,
                          .intermediate = 8192,
                          .rotary_dim = 64,
                          .dtype = DType::bfloat16}),
                   {{1500, 3, 700}, 16}});
  cases.push_back({"long_multi_query",
                   {.hidden = 1024, .heads = 8, .kv_heads = 1, .intermediate = 512},
                   {{2047}}});
  return cases;
}

class LayerOptions : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = cuda_unavailable_reason(); !reason.empty())
      GTEST_SKIP() << reason;
  }
};

class LayerOptionCases : public LayerOptions, public testing::WithParamInterface<OptionCase> {};

TEST_P(LayerOptionCases, AgreeWithTheCpu) {
  OptionLayer layer(GetParam().kind, GetParam().rows);
  expect_as_on_the_cpu(layer);
  layer.upload();
  layer.run(Call::layer, true);
  for (const char* name : kLayerResults)
    expect_recorded_bits("options/" + GetParam().name + "/" + name, layer.download(name));
}

INSTANTIATE_TEST_SUITE_P(Gpu, LayerOptionCases, testing::ValuesIn(option_cases()),
                         [](const auto& info) { return info.param.name; });

const Kind kSmall = {
    .hidden = 256, .heads = 8, .kv_heads = 2, .intermediate = 100, .rotary_dim = 32};

// A row has the same bits in any company.
TEST_F(LayerOptions, ARowHasTheBitsThatItHasAlone) {
  for (const Kind& kind : {kSmall, llama(kSmall)}) {
    OptionLayer all(kind, {{70, 0, 199, 64, 5, 31}, 16});
    // As wide a table, and as many pages.
    OptionLayer alone(kind, {{199}, 16, "pcshd", 0, all.rows().pages()});
    for (const Call call : {Call::layer, Call::parts}) {
      all.upload();
      all.run(call, true);
      for (std::int64_t row = 0; row < all.rows().count(); ++row) {
        alone.copy_row_from(all, row);
        alone.run(call, true);
        for (const char* name : kLayerResults)
          EXPECT_TRUE(alone.download(name) == all.row_of(all.download(name), row))
              << name << " of row " << row;
      }
    }
  }
}

// In pages as in rows of a cache: the same kernels in the same order, streamed or not.
TEST_F(LayerOptions, PagesGiveTheBitsOfRows) {
  std::vector<Kind> kinds = {kSmall,          llama(kSmall),    streamed(32, 8),
                             streamed(80, 4), streamed(128, 3), streamed(256, 2)};
  kinds.push_back(streamed(80, 32));
  kinds.back().intermediate = 10240;
  for (const Kind& kind : kinds)
    for (const std::int64_t size : {16, 32, 64})
      for (const std::int64_t position : {0, 15, 16, 63, 64, 130, 1000, 2047}) {
        SCOPED_TRACE("head size " + std::to_string(kind.dim()) + ", pages of " +
                     std::to_string(size) + ", position " + std::to_string(position));
        OptionLayer paged(kind, {{position}, size}), in_rows(kind, {{position}});
        in_rows.copy_row_from(paged, 0);
        in_rows.gather_pages_of(paged);
        for (const Call call : {Call::layer, Call::parts}) {
          paged.run(call, true);
          in_rows.run(call, true);
          for (const char* name : kLayerResults)
            EXPECT_TRUE(paged.download(name) == in_rows.download(name)) << name;
        }
      }
}

// While a kernel of another stream holds SMs, a call on pages ends on the others, with the same
// bits: those of its blocks that run do what the others would.
TEST_F(LayerOptions, PagedCallsEndOnTheSmsThatThereAre) {
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "counting SMs");
  OptionLayer layer(streamed(80, 32), {{1000}, 16});
  for (const std::int32_t position : {1000, -1}) {
    layer.position(0) = position;
    layer.upload();
    layer.run(Call::layer, true);
    const auto expected = layer.download("output"), cache = layer.download("kv");
    for (const int count : {1, sms / 2, sms - 1}) {
      SCOPED_TRACE(std::to_string(count) + " held");
      layer.upload();
      cudaStream_t stream = nullptr;
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
      check(cudaDeviceSynchronize(), "writing tensors");
      {
        HeldSms held(count);
        layer.run(Call::layer, true, stream);
        check(cudaStreamSynchronize(stream), "running a layer");
        EXPECT_TRUE(held.held()) << "the call waited for the SMs";
      }
      check(cudaStreamDestroy(stream), "giving back a stream");
      EXPECT_TRUE(layer.download("output") == expected);
      EXPECT_TRUE(layer.download("kv") == cache);
    }
  }
}

// NaN in all results of a row, no write, and the other rows do not notice.
TEST_F(LayerOptions, RowsOutsideGiveNaNAndWriteNothing) {
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  Kind relu = llama(kSmall);  // which makes 0 of NaN
  relu.gated = false;
  relu.activation = Activation::relu;
  for (const Kind& kind : {kSmall, relu})
    for (const auto& [position, page] : std::initializer_list<std::pair<int, int>>{{-1, 0},
                                                                                   {48 + 3 * 16, 0},
                                                                                   {kMost, 0},
                                                                                   {-kMost - 1, 0},
                                                                                   {20, -1},
                                                                                   {20, 1 << 20},
                                                                                   {20, kMost}})
      for (const Call call : {Call::layer, Call::parts}) {
        SCOPED_TRACE("position " + std::to_string(position) + ", page " + std::to_string(page));
        OptionLayer layer(kind, {{5, 20, 60}, 16});
        layer.run(call, true);
        std::map<std::string, std::vector<std::byte>> good;
        const std::vector<const char*> names =
            call == Call::layer
                ? std::vector<const char*>(std::begin(kLayerResults), std::end(kLayerResults))
                : std::vector<const char*>{"attn_output", "mlp_intermediate", "k_new", "v_new",
                                           "output"};
        for (const char* name : names) good[name] = layer.download(name);
        const auto written = layer.download("kv");
        layer.position(1) = position;
        if (page != 0) layer.page(1, 0) = page;
        layer.host("kv") = written;  // the other rows write what is there
        layer.upload(0);
        layer.run(call, true);
        for (const char* name : names) {
          const auto found = layer.download(name);
          EXPECT_TRUE(all_nan(layer.row_of(found, 1))) << name;
          for (const std::int64_t row : {0, 2})
            EXPECT_TRUE(layer.row_of(found, row) == layer.row_of(good[name], row))
                << name << " of row " << row;
        }
        EXPECT_TRUE(layer.download("kv") == written);
      }
}

// The same of the one row of a streamed layer, where all results are that row's.
TEST_F(LayerOptions, AStreamedRowOutsideGivesNaNAndWritesNothing) {
  OptionLayer layer(streamed(80, 32), {{100}, 16});
  const auto cache = layer.host("kv");
  const auto good = layer.page(0, 3);
  for (const auto& [position, page] : std::initializer_list<std::pair<int, int>>{
           {-1, good}, {8 * 16, good}, {100, -1}, {100, 1 << 20}, {50, -7}, {47, -7}})
    for (const Call call : {Call::layer, Call::parts}) {
      SCOPED_TRACE("position " + std::to_string(position) + ", page " + std::to_string(page));
      layer.position(0) = position;
      layer.page(0, 3) = page;
      layer.upload(0);
      layer.run(call, true);
      // A page behind the position is not looked at.
      const bool is_inside = position == 47;
      for (const char* name : {"output", "k_new", "v_new"})
        EXPECT_EQ(all_nan(layer.download(name)), !is_inside) << name;
      if (call == Call::parts) {
        EXPECT_EQ(all_nan(layer.download("mlp_intermediate")), !is_inside);
      }
      EXPECT_EQ(layer.download("kv") == cache, !is_inside);
    }
}

// Positions and tables are read when a graph runs.
TEST_F(LayerOptions, OneGraphServesEveryPositionAndTable) {
  for (const auto& [kind, rows] : std::initializer_list<std::pair<Kind, std::int64_t>>{
           {kSmall, 3}, {llama(kSmall), 3}, {llama(kSmall), 1}, {streamed(80, 32), 1}}) {
    OptionLayer layer(kind, {std::vector<std::int64_t>(static_cast<std::size_t>(rows), 100), 16});
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "beginning a capture");
    layer.run(Call::layer, true, stream);
    layer.run(Call::parts, true, stream);
    check(cudaStreamEndCapture(stream, &graph), "ending a capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "instantiating a graph");
    for (const std::int32_t position : {0, 15, 16, 64, 100}) {
      for (std::int64_t row = 0; row < rows; ++row)
        layer.position(row) = position - static_cast<std::int32_t>(row) % (position + 1);
      std::swap(layer.page(0, 0), layer.page(rows - 1, rows == 1 ? 1 : 0));
      layer.upload();
      layer.run(Call::layer, true);
      layer.run(Call::parts, true);
      std::map<std::string, std::vector<std::byte>> expected;
      for (const char* name : {"output", "k_new", "v_new", "attn_output", "mlp_intermediate", "kv"})
        expected[name] = layer.download(name);
      layer.upload();
      check(cudaGraphLaunch(executable, stream), "replaying");
      check(cudaStreamSynchronize(stream), "replaying");
      for (const auto& [name, bytes] : expected)
        EXPECT_TRUE(layer.download(name) == bytes) << name << " at position " << position;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

// All rows write before any reads: tokens of one sequence, as if one had come after the other.
TEST_F(LayerOptions, RowsMayFollowEachOtherInOneSequence) {
  OptionLayer layer(llama(kSmall), {{18, 15, 16, 14, 17}, 16});
  for (std::int64_t row = 1; row < 5; ++row)
    for (std::int64_t i = 0; i < layer.rows().width(); ++i) layer.page(row, i) = layer.page(0, i);
  expect_as_on_the_cpu(layer);
}

}  // namespace
}  // namespace clusterfusion::test
