// The layer calls on the GPU against a layer in float64, and what they promise beside numbers.
//
// CLUSTERFUSION_LAYER_REPEATS says how often the tests of repeats repeat (10000): few under
// compute-sanitizer.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend.hpp"
#include "backend/cuda/driver_function.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/ops/plain_params.hpp"
#include "clusterfusion/error.hpp"
#include "held_sms.hpp"
#include "ops/reference_layer.hpp"
#include "recorded_bits.hpp"

namespace clusterfusion::test {
namespace {

using cuda::check;
using cuda::DeviceMemory;
using Bytes = std::vector<std::byte>;

constexpr auto kFused = ops::DecoderLayerVariant::fused;
constexpr auto kSplit = ops::DecoderLayerVariant::split;

int repeats() {
  const char* asked = std::getenv("CLUSTERFUSION_LAYER_REPEATS");
  return asked != nullptr ? std::max(1, std::atoi(asked)) : 10000;
}

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "running the layer calls"); }

 private:
  cudaStream_t stream_ = nullptr;
};

enum class Call { attention_mlp_up, mlp_down, fused, split };
constexpr Call kAllCalls[] = {Call::attention_mlp_up, Call::mlp_down, Call::fused, Call::split};
constexpr const char* kCallNames[] = {"attention_mlp_up", "mlp_down", "fused", "split"};

std::vector<const char*> results_of(Call call) {
  switch (call) {
    case Call::attention_mlp_up: return {"attn_output", "mlp_intermediate", "k_new", "v_new"};
    case Call::mlp_down: return {"output"};
    default: return {"output", "k_new", "v_new"};
  }
}

// A fixture's tensors on the GPU, and the calls on a stream of its own.
class DeviceLayer {
 public:
  explicit DeviceLayer(LayerFixture& host) : host_(host), position_(sizeof(std::int32_t), "tests") {
    for (auto& [name, tensor] : host.owned) {
      DeviceMemory& memory =
          memory_.emplace(name, DeviceMemory(num_bytes(tensor.view()), "tests")).first->second;
      moved_[tensor.view().data] = memory.as<>();
    }
    for (auto& [name, tensor] : host.owned) upload(name, tensor.bytes());
    tensors = host.tensors;
    for (DLTensor* tensor :
         {&tensors.input, &tensors.weight_qkv, &tensors.bias_qkv, &tensors.weight_o,
          &tensors.bias_o, &tensors.k_cache, &tensors.v_cache, &tensors.ln_weight, &tensors.ln_bias,
          &tensors.cos, &tensors.sin, &tensors.post_ln_weight, &tensors.post_ln_bias,
          &tensors.mlp_up_weight, &tensors.mlp_up_bias})
      *tensor = moved(*tensor);
    const auto& a = host.attention;
    attention_ = {moved(a.attn_output), moved(a.mlp_intermediate), moved(a.k_new), moved(a.v_new)};
    layer_ = {moved(host.layer.output), moved(host.layer.k_new), moved(host.layer.v_new)};
    down_ = {tensors.input, attention_.attn_output, attention_.mlp_intermediate,
             moved(host.down_weight), moved(host.down_bias)};
    options = host.options;
    options.rotary_dim = host.sizes.rotary_dim;
  }

  // The position as a number, or in device memory.
  void at(std::int64_t position) { tensors.current_seq_len = {position, {}}; }
  void at_device(std::int64_t position) {
    set_device_position(position);
    DLTensor& tensor = tensors.current_seq_len.tensor;
    tensor = {};
    tensor.data = position_.as<>();
    tensor.device = {kDLCUDA, 0};
    tensor.ndim = 1;
    tensor.dtype = {kDLInt, 32, 1};
    tensor.shape = &one_;
  }
  void set_device_position(std::int64_t position) {
    const auto value = static_cast<std::int32_t>(position);
    check(cudaMemcpyAsync(position_.as<>(), &value, sizeof(value), cudaMemcpyHostToDevice,
                          stream.get()),
          "writing the position");
  }

  void enqueue(Call call) { enqueue(call, stream.get()); }
  void enqueue(Call call, cudaStream_t where) {
    switch (call) {
      case Call::attention_mlp_up:
        ops::attention_mlp_up(tensors, options, attention_, where);
        break;
      case Call::mlp_down: ops::mlp_down(down_, layer_.output, where); break;
      default:
        ops::decoder_layer(tensors, down_.mlp_down_weight, down_.mlp_down_bias, options, layer_,
                           call == Call::split ? kSplit : kFused, where);
    }
  }

  void upload(const std::string& name, const Bytes& bytes) {
    check(cudaMemcpyAsync(memory_.at(name).as<>(), bytes.data(), bytes.size(),
                          cudaMemcpyHostToDevice, stream.get()),
          "writing a tensor");
    stream.wait();
  }
  const DeviceMemory& memory(const std::string& name) const { return memory_.at(name); }
  Bytes download(const std::string& name) const {
    const DeviceMemory& memory = memory_.at(name);
    Bytes bytes(static_cast<std::size_t>(memory.bytes()));
    check(cudaMemcpyAsync(bytes.data(), memory.as<>(), bytes.size(), cudaMemcpyDeviceToHost,
                          stream.get()),
          "reading a tensor");
    stream.wait();
    return bytes;
  }
  Bytes download(Call call) const {
    Bytes all;
    for (const char* name : results_of(call)) {
      const Bytes one = download(name);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
  // Results are NaN before a call, so that one that nobody writes is seen.
  void forget_results() {
    for (const char* name : {"attn_output", "mlp_intermediate", "output", "k_new", "v_new"})
      check(cudaMemsetAsync(memory_.at(name).as<>(), 0xff,
                            static_cast<std::size_t>(memory_.at(name).bytes()), stream.get()),
            "forgetting results");
  }
  // The caches as the fixture has them; rows from `position` on are NaN.
  void fill_caches(std::int64_t position) {
    for (const char* name : {"k_cache", "v_cache"}) upload(name, cache_before(name, position));
  }
  Bytes cache_before(const char* name, std::int64_t position) const {
    Bytes bytes = host_[name].bytes();
    std::fill(bytes.begin() + position * host_.sizes.hidden * 2, bytes.end(), std::byte{0xff});
    return bytes;
  }
  // All results of a call on fresh caches, with the position as it is set.
  Bytes run(Call call, std::int64_t position) {
    if (call != Call::mlp_down) {
      fill_caches(position);
      forget_results();
    }
    enqueue(call);
    return download(call);
  }

  ops::LayerTensors tensors;
  ops::LayerOptions options;
  Stream stream;

 private:
  DLTensor moved(DLTensor tensor) const {
    tensor.data = moved_.at(tensor.data);
    tensor.device = {kDLCUDA, 0};
    return tensor;
  }

  LayerFixture& host_;
  std::map<std::string, DeviceMemory> memory_;
  std::map<const void*, void*> moved_;
  DeviceMemory position_;
  std::int64_t one_ = 1;
  ops::AttentionMlpUpResults attention_;
  ops::DecoderLayerResults layer_;
  ops::MlpDownTensors down_;
};

struct LayerCase {
  std::string name;
  LayerSizes sizes;
  DType dtype = DType::float16;
  Activation activation = Activation::gelu_erf;
  bool biases = true;
};
std::ostream& operator<<(std::ostream& out, const LayerCase& c) { return out << c.name; }

// hidden, heads, intermediate, rotary_dim, rows of the caches.
std::vector<LayerCase> layer_cases() {
  constexpr auto kBfloat = DType::bfloat16;
  std::vector<LayerCase> cases = {
      {"tiny", {128, 4, 512, 8, 70}},
      {"tiny_tanh", {128, 4, 512, 8, 9}, DType::float16, Activation::gelu_tanh},
      {"tiny_without_biases", {128, 4, 512, 8, 9}, DType::float16, Activation::gelu_erf, false},
      {"head_16", {128, 8, 224, 4, 130}},
      {"head_48_not_rotated", {96, 2, 160, 0, 40}},
      {"head_64_all_rotated", {128, 2, 512, 64, 5}},  // a cache shorter than a block of it
      {"head_80", {160, 2, 640, 20, 200}},
      {"head_128", {256, 2, 1024, 32, 300}},
      {"head_112", {224, 2, 1024, 28, 150}},
      {"head_224", {448, 2, 2048, 56, 150}},
      {"head_256", {512, 2, 2048, 64, 300}},
      {"long_context", {256, 4, 1024, 16, 2048}},
      {"pythia_410m", {1024, 16, 4096, 16, 1100}},
      {"wide_mlp", {1024, 16, 20480, 16, 130}},
      {"pythia_1b", {2048, 8, 8192, 64, 1100}},
      {"pythia_2b8", {2560, 32, 10240, 20, 2048}},
      {"pythia_6b9", {4096, 32, 16384, 32, 2048}},
      // Those that cannot be streamed: by their heads, their hidden size, their intermediate size.
      {"head_8", {128, 16, 512, 8, 130}},
      {"hidden_144", {144, 3, 512, 8, 130}},
      {"intermediate_500", {128, 4, 500, 8, 130}},
      {"tiny_head_1", {7, 7, 3, 0, 70}},
      {"tiny_head_10", {20, 2, 36, 4, 130}},
      {"tiny_head_11", {33, 3, 77, 2, 300}},
      {"tiny_head_11_tanh", {33, 3, 77, 2, 9}, DType::float16, Activation::gelu_tanh},
      {"tiny_head_11_without_biases",
       {33, 3, 77, 2, 9},
       DType::float16,
       Activation::gelu_erf,
       false},
      {"head_48_of_96", {96, 2, 352, 12, 300}},
      {"head_88", {352, 4, 1472, 22, 1100}},
      {"head_260", {1040, 4, 4160, 66, 1100}},
      {"head_512", {1024, 2, 4096, 128, 300}},
      {"head_2056_all_rotated", {2056, 1, 64, 2056, 300}},
      {"hidden_2816", {2816, 22, 11264, 128, 2048}},
      {"gpt_neox_20b", {6144, 64, 24576, 24, 2048}},
  };
  const std::size_t count = cases.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (cases[i].activation != Activation::gelu_erf || !cases[i].biases) continue;
    cases.push_back(cases[i]);
    cases.back().name += "_bf16";
    cases.back().dtype = kBfloat;
  }
  return cases;
}

std::vector<std::int64_t> positions_of(const LayerSizes& sizes) {
  // In float64 the largest shape takes its time.
  if (sizes.hidden > 5120) return {0, 64, 1000, sizes.max_positions - 1};
  std::vector<std::int64_t> positions;
  for (const std::int64_t position : {0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 65, 129, 1000, 2047})
    if (position < sizes.max_positions - 1) positions.push_back(position);
  positions.push_back(sizes.max_positions - 1);
  return positions;
}

// Relative to the results' own size. The 16-bit types round about six times on the way to an
// output (normalised input, query, key and value, softmax weights, attention, output), each by
// 2 x 10^-4 (1.6 x 10^-3) in the mean, and errors of scores are exponents: less than half of this.
double limit_of(DType dtype) { return dtype == DType::float16 ? 2e-3 : 1.6e-2; }

void expect_close(const Bytes& bytes, const Values& expected, DType dtype,
                  const std::string& name) {
  ASSERT_EQ(bytes.size(), expected.size() * 2) << name;
  double error = 0, size = 0, worst = 0;
  std::size_t where = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    const double difference = widen(bits, dtype) - expected[i];
    ASSERT_TRUE(std::isfinite(difference)) << name << ": element " << i << " is not finite";
    error += difference * difference;
    size += expected[i] * expected[i];
    if (std::fabs(difference) > worst) {
      worst = std::fabs(difference);
      where = i;
    }
  }
  const double rms = std::sqrt(size / static_cast<double>(expected.size()));
  EXPECT_LE(std::sqrt(error / size), limit_of(dtype))
      << name << ": relative error; the worst is element " << where << " of " << expected.size()
      << ", off by " << worst;
  EXPECT_LE(worst, 6 * limit_of(dtype) * rms) << name << ": element " << where;
}

Values decoded(const Bytes& bytes, DType dtype) {
  Values values;
  for (std::size_t i = 0; i < bytes.size(); i += 2) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i, 2);
    values.push_back(widen(bits, dtype));
  }
  return values;
}

// Row `position` is the new one, all others are as before.
void expect_one_row_written(const DeviceLayer& layer, const char* cache, const char* fresh,
                            std::int64_t position) {
  const Bytes row = layer.download(fresh);
  Bytes expected = layer.cache_before(cache, position);
  std::copy(row.begin(), row.end(),
            expected.begin() + position * static_cast<std::int64_t>(row.size()));
  EXPECT_TRUE(layer.download(cache) == expected) << cache << " after position " << position;
}

class LayerTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = cuda_unavailable_reason(); !reason.empty())
      GTEST_SKIP() << reason;
  }
};

class LayerShapes : public LayerTest, public testing::WithParamInterface<LayerCase> {};

// At each context: every call beside float64, with the position as a number and on the device, on
// caches whose unused rows are NaN.
TEST_P(LayerShapes, AgreeWithFloat64) {
  const LayerCase& c = GetParam();
  LayerFixture host(c.sizes, c.dtype);
  host.options.activation = c.activation;
  ReferenceLayer reference(host, c.dtype, c.biases);
  DeviceLayer layer(host);
  if (!c.biases) layer.tensors.bias_qkv = layer.tensors.bias_o = DLTensor{};
  const std::vector<std::int64_t> positions = positions_of(c.sizes);
  for (const std::int64_t position : positions) {
    SCOPED_TRACE("position " + std::to_string(position));
    const Reference expected = reference.at(position);
    for (const Call call : kAllCalls) {
      SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
      layer.at(position);
      const Bytes bits = layer.run(call, position);
      expect_recorded_bits(std::string(kCallNames[static_cast<int>(call)]) + "/" + c.name + "/" +
                               std::to_string(position),
                           bits);
      if (call == Call::mlp_down) {
        // Of what attention_mlp_up has left.
        const Values output =
            reference.output_of(decoded(layer.download("attn_output"), c.dtype),
                                decoded(layer.download("mlp_intermediate"), c.dtype));
        expect_close(layer.download("output"), output, c.dtype, "output");
        continue;
      }
      if (call == Call::attention_mlp_up) {
        expect_close(layer.download("attn_output"), expected.attention, c.dtype, "attn_output");
        expect_close(layer.download("mlp_intermediate"), expected.intermediate, c.dtype,
                     "mlp_intermediate");
      } else {
        expect_close(layer.download("output"), expected.output, c.dtype, "output");
      }
      expect_close(layer.download("k_new"), expected.keys, c.dtype, "k_new");
      expect_close(layer.download("v_new"), expected.values, c.dtype, "v_new");
      expect_one_row_written(layer, "k_cache", "k_new", position);
      expect_one_row_written(layer, "v_cache", "v_new", position);
      layer.at_device(position);
      EXPECT_TRUE(layer.run(call, position) == bits) << "position on the device";
      expect_one_row_written(layer, "k_cache", "k_new", position);
    }
    if (HasFailure()) return;  // one context's failures tell enough
  }
}

INSTANTIATE_TEST_SUITE_P(Gpu, LayerShapes, testing::ValuesIn(layer_cases()),
                         [](const auto& info) { return info.param.name; });

struct NamedSizes {
  std::string name;
  LayerSizes sizes;
};
std::ostream& operator<<(std::ostream& out, const NamedSizes& s) { return out << s.name; }

// What does not depend on the shape, on small ones and on full ones, streamed and not.
class LayerRuns : public LayerTest, public testing::WithParamInterface<NamedSizes> {
 protected:
  std::int64_t last() const { return GetParam().sizes.max_positions - 1; }
};
INSTANTIATE_TEST_SUITE_P(Gpu, LayerRuns,
                         testing::Values(NamedSizes{"tiny", {128, 4, 512, 8, 300}},
                                         NamedSizes{"pythia_2b8", {2560, 32, 10240, 20, 1001}},
                                         NamedSizes{"wide_mlp", {1024, 16, 20480, 16, 300}},
                                         NamedSizes{"head_11", {33, 3, 77, 2, 300}},
                                         NamedSizes{"hidden_2816", {2816, 22, 11264, 128, 1001}}),
                         [](const auto& info) { return info.param.name; });

bool all_nan(const Bytes& bytes) {
  const Values values = decoded(bytes, DType::float16);
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isnan(v); });
}

int count_sms() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "counting SMs");
  return count;
}

// While a kernel of another stream holds SMs for ever, calls end on the others: what their missing
// blocks would do is done by those that run. With the same bits.
TEST_P(LayerRuns, EndOnTheSmsThatThereAre) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer layer(host);
  const int sms = count_sms();
  for (const std::int64_t position : {std::int64_t{0}, last()}) {
    std::map<Call, Bytes> expected;
    layer.at(position);
    for (const Call call : kAllCalls) expected[call] = layer.run(call, position);
    for (const int count : {1, sms / 2, sms - 2, sms - 1}) {
      SCOPED_TRACE("position " + std::to_string(position) + ", " + std::to_string(count) + " held");
      HeldSms held(count);
      for (const Call call : kAllCalls) {
        SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
        EXPECT_TRUE(layer.run(call, position) == expected[call]);
      }
      layer.at_device(last() + 1);  // no position
      EXPECT_TRUE(all_nan(layer.run(Call::fused, position)));
      EXPECT_TRUE(all_nan(layer.run(Call::attention_mlp_up, position)));
      layer.at(position);
      EXPECT_TRUE(held.held()) << "the calls waited for the SMs";
    }
  }
}

// The same while SMs come back one after the other, so that blocks start late amid a launch.
TEST_P(LayerRuns, TakeInBlocksThatStartLate) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer layer(host);
  layer.at(last());
  std::map<Call, Bytes> expected;
  for (const Call call : kAllCalls) expected[call] = layer.run(call, last());
  constexpr int kGroups = 6;
  for (int round = 0; round < 6; ++round) {
    for (const Call call : kAllCalls) {
      SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
      std::vector<std::unique_ptr<HeldSms>> groups;
      for (int i = 0; i < kGroups; ++i)
        groups.push_back(std::make_unique<HeldSms>((count_sms() - 1) / kGroups));
      std::thread releases([&] {
        for (const auto& group : groups) {
          std::this_thread::sleep_for(std::chrono::microseconds(40 << round));
          group->end();
        }
      });
      EXPECT_TRUE(layer.run(call, last()) == expected[call]);
      releases.join();
    }
  }
}

// Calls follow each other without a wait, and each leaves its results in a place of its own.
TEST_P(LayerRuns, RepeatsGiveOneBitPattern) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer layer(host);
  layer.at(last());
  for (const Call call : kAllCalls) {
    SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
    const Bytes expected = layer.run(call, last());
    constexpr int kTogether = 64;
    const std::size_t size = expected.size();
    DeviceMemory copies(static_cast<std::int64_t>(size) * kTogether, "tests");
    std::vector<std::byte> found(size * kTogether);
    for (int done = 0; done < repeats(); done += kTogether) {
      for (int i = 0; i < kTogether; ++i) {
        layer.enqueue(call);
        std::size_t at = size * static_cast<std::size_t>(i);
        for (const char* name : results_of(call)) {
          const DeviceMemory& result = layer.memory(name);
          const auto bytes = static_cast<std::size_t>(result.bytes());
          check(cudaMemcpyAsync(copies.as<>() + at, result.as<>(), bytes, cudaMemcpyDeviceToDevice,
                                layer.stream.get()),
                "keeping a result");
          at += bytes;
        }
      }
      check(cudaMemcpyAsync(found.data(), copies.as<>(), found.size(), cudaMemcpyDeviceToHost,
                            layer.stream.get()),
            "reading results");
      layer.stream.wait();
      for (int i = 0; i < kTogether; ++i)
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(),
                               found.begin() + static_cast<std::ptrdiff_t>(size) * i))
            << "repeat " << done + i;
    }
  }
}

// Each thread on a stream of its own, with tensors of its own.
TEST_P(LayerRuns, ThreadsAndStreamsAtOnceGiveTheSameBits) {
  LayerFixture host(GetParam().sizes);
  std::vector<Bytes> expected;
  {
    DeviceLayer layer(host);
    for (const Call call : kAllCalls) {
      layer.at(last());
      expected.push_back(layer.run(call, last()));
    }
  }
  constexpr int kThreads = 2;
  const int rounds = std::max(1, repeats() / 100);
  std::atomic<int> equal = 0;
  std::vector<std::thread> threads;
  std::vector<std::string> errors(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      try {
        DeviceLayer layer(host);
        layer.at(last());
        layer.fill_caches(last());
        for (int round = 0; round < rounds; ++round)
          for (const Call call : kAllCalls) {
            layer.enqueue(call);
            if (layer.download(call) == expected[static_cast<std::size_t>(call)]) ++equal;
          }
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(t)] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(equal, kThreads * rounds * static_cast<int>(std::size(kAllCalls)));
}

// Two threads on one stream, each with tensors of its own: what a call hands from one launch to the
// next is not another's.
TEST_P(LayerRuns, ThreadsOnOneStreamGiveTheSameBits) {
  constexpr int kThreads = 2;
  std::vector<std::unique_ptr<LayerFixture>> hosts;
  std::vector<std::unique_ptr<DeviceLayer>> layers;
  std::vector<Bytes> expected;
  for (unsigned t = 0; t < kThreads; ++t) {
    hosts.push_back(std::make_unique<LayerFixture>(GetParam().sizes, DType::float16, 7 + t));
    layers.push_back(std::make_unique<DeviceLayer>(*hosts.back()));
    layers.back()->at(last());
    expected.push_back(layers.back()->run(Call::split, last()));
  }
  const Stream together;
  const int rounds = std::max(1, repeats() / 100);
  for (int round = 0; round < rounds; ++round) {
    for (const auto& layer : layers) {
      layer->forget_results();
      layer->stream.wait();
    }
    std::vector<std::thread> threads;
    std::vector<std::string> errors(kThreads);
    for (std::size_t t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        try {
          for (int i = 0; i < 8; ++i) layers[t]->enqueue(Call::split, together.get());
        } catch (const std::exception& error) {
          errors[t] = error.what();
        }
      });
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) ASSERT_EQ(error, "");
    together.wait();
    for (std::size_t t = 0; t < kThreads; ++t)
      ASSERT_TRUE(layers[t]->download(Call::split) == expected[t]) << "round " << round;
  }
}

// A captured graph, with the end of its life.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "beginning a capture");
    try {
      work();
    } catch (...) {
      cudaGraph_t broken = nullptr;
      cudaStreamEndCapture(stream, &broken);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph_), "ending a capture");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "instantiating a graph");
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) { check(cudaGraphLaunch(executable_, stream), "replaying"); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// One graph, captured on a stream that no call has seen, with other calls between its replays.
TEST_P(LayerRuns, OneGraphServesEveryPosition) {
  LayerFixture host(GetParam().sizes);
  for (const Call call : {Call::attention_mlp_up, Call::fused, Call::split}) {
    SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
    DeviceLayer eager(host), replayed(host);
    replayed.at_device(0);
    Graph graph(replayed.stream.get(), [&] { replayed.enqueue(call); });
    Graph thrice(replayed.stream.get(), [&] {
      for (int i = 0; i < 3; ++i) replayed.enqueue(call);
    });
    for (const std::int64_t position : positions_of(GetParam().sizes)) {
      SCOPED_TRACE("position " + std::to_string(position));
      eager.at(position);
      const Bytes expected = eager.run(call, position);
      for (Graph* one : {&graph, &thrice, &graph}) {
        replayed.fill_caches(position);
        replayed.forget_results();
        replayed.set_device_position(position);
        one->launch(replayed.stream.get());
        ASSERT_TRUE(replayed.download(call) == expected);
        expect_one_row_written(replayed, "k_cache", "k_new", position);
        expect_one_row_written(replayed, "v_cache", "v_new", position);
      }
    }
  }
}

// mlp_down has no position; its results follow what its inputs hold at the time.
TEST_P(LayerRuns, GraphOfTheSecondHalf) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer layer(host);
  Graph graph(layer.stream.get(), [&] { layer.enqueue(Call::mlp_down); });
  for (const std::int64_t position : {std::int64_t{0}, last()}) {
    layer.at(position);
    layer.run(Call::attention_mlp_up, position);
    const Bytes expected = layer.run(Call::mlp_down, position);
    check(cudaMemsetAsync(layer.memory("output").as<>(), 0xff, expected.size(), layer.stream.get()),
          "forgetting the output");
    graph.launch(layer.stream.get());
    EXPECT_TRUE(layer.download(Call::mlp_down) == expected);
  }
}

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  // Work that `later` gets from now on comes after what `earlier` has got.
  void order(cudaStream_t earlier, cudaStream_t later) {
    check(cudaEventRecord(event_, earlier), "recording an event");
    check(cudaStreamWaitEvent(later, event_), "waiting for an event");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// One capture of two streams, whose calls nothing orders.
TEST_P(LayerRuns, BranchesOfAGraphGiveTheSameBits) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer one(host), other(host);
  for (const Call call : {Call::fused, Call::split}) {
    SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
    for (DeviceLayer* layer : {&one, &other}) layer->at(last());
    const Bytes expected = one.run(call, last());
    Event fork, join;
    Graph graph(one.stream.get(), [&] {
      fork.order(one.stream.get(), other.stream.get());
      for (int i = 0; i < 4; ++i) {
        one.enqueue(call);
        other.enqueue(call);
      }
      join.order(other.stream.get(), one.stream.get());
    });
    for (int replay = 0; replay < std::max(1, repeats() / 200); ++replay) {
      for (DeviceLayer* layer : {&one, &other}) {
        layer->fill_caches(last());
        layer->forget_results();
        layer->stream.wait();
      }
      graph.launch(one.stream.get());
      one.stream.wait();
      ASSERT_TRUE(one.download(call) == expected) << "replay " << replay;
      ASSERT_TRUE(other.download(call) == expected) << "replay " << replay;
    }
  }
}

TEST_P(LayerRuns, APositionOutsideGivesNaN) {
  LayerFixture host(GetParam().sizes);
  DeviceLayer layer(host);
  for (const Call call : {Call::attention_mlp_up, Call::fused, Call::split}) {
    SCOPED_TRACE(kCallNames[static_cast<int>(call)]);
    layer.at(3);
    const Bytes expected = layer.run(call, 3);
    for (const std::int64_t position :
         {std::int64_t{-1}, last() + 1, std::int64_t{std::numeric_limits<std::int32_t>::max()},
          std::int64_t{std::numeric_limits<std::int32_t>::min()}}) {
      SCOPED_TRACE("position " + std::to_string(position));
      layer.fill_caches(5);
      layer.at_device(position);
      layer.enqueue(call);
      EXPECT_TRUE(all_nan(layer.download(call)));
      EXPECT_TRUE(layer.download("k_cache") == layer.cache_before("k_cache", 5));
      EXPECT_TRUE(layer.download("v_cache") == layer.cache_before("v_cache", 5));
      layer.at(3);
      EXPECT_TRUE(layer.run(call, 3) == expected) << "the call behind it";
    }
  }
}

// One pass over the squares would lose the deviation beside a mean that is a thousand times it.
TEST_P(LayerRuns, NormalisesInputsWithALargeMean) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    const float mean = dtype == DType::float16 ? 2000.0f : -250.0f;
    LayerFixture host(GetParam().sizes, dtype);
    OwnedTensor& input = host["input"];
    for (std::int64_t i = 0; i < input.count(); ++i)
      input.set(i, mean + 2.0f * static_cast<float>(input.at(i)));
    const Reference expected = ReferenceLayer(host, dtype).at(last());
    DeviceLayer layer(host);
    layer.at(last());
    layer.run(Call::attention_mlp_up, last());
    expect_close(layer.download("attn_output"), expected.attention, dtype, "attn_output");
    expect_close(layer.download("mlp_intermediate"), expected.intermediate, dtype,
                 "mlp_intermediate");
    layer.run(Call::fused, last());
    expect_close(layer.download("output"), expected.output, dtype, "output");
  }
}

// Shapes that share a kernel, one after the other and back, on one stream.
TEST_F(LayerTest, ShapesTakeTurns) {
  const LayerSizes shapes[] = {
      {2560, 32, 10240, 20, 70}, {128, 4, 512, 8, 70}, {33, 3, 77, 2, 70}, {160, 2, 640, 20, 70}};
  std::vector<std::unique_ptr<LayerFixture>> hosts;
  std::vector<std::unique_ptr<DeviceLayer>> layers;
  std::vector<std::vector<Bytes>> expected;
  const Stream together;
  for (int turn = 0; turn < 3; ++turn)
    for (std::size_t i = 0; i < std::size(shapes); ++i) {
      if (turn == 0) {
        hosts.push_back(std::make_unique<LayerFixture>(shapes[i]));
        layers.push_back(std::make_unique<DeviceLayer>(*hosts.back()));
        expected.emplace_back();
        layers[i]->at(69);
        layers[i]->fill_caches(69);
      }
      for (const Call call : kAllCalls) {
        layers[i]->enqueue(call, together.get());
        together.wait();
        const Bytes found = layers[i]->download(call);
        if (turn == 0)
          expected[i].push_back(found);
        else
          EXPECT_TRUE(found == expected[i][static_cast<std::size_t>(call)])
              << "shape " << i << ", turn " << turn;
      }
    }
}

// Other code may take a thread's context away. The CUDA runtime finds it again by itself.
TEST_F(LayerTest, RunWithoutACurrentContext) {
  const auto set_context = cuda::driver_function<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent");
  for (const auto& [sizes, new_thread] : {std::pair{LayerSizes{128, 4, 512, 8, 70}, false},
                                          {LayerSizes{128, 4, 512, 8, 70}, true},
                                          {LayerSizes{33, 3, 77, 2, 70}, false},
                                          {LayerSizes{33, 3, 77, 2, 70}, true}}) {
    LayerFixture host(sizes);
    DeviceLayer layer(host);
    layer.at(69);
    for (const Call call : kAllCalls) {
      const Bytes expected = layer.run(call, 69);
      const auto again = [&] {
        for (int repeat = 0; repeat < 2; ++repeat) {
          layer.fill_caches(69);
          if (call != Call::mlp_down) layer.forget_results();
          EXPECT_EQ(set_context(nullptr), CUDA_SUCCESS);
          layer.enqueue(call);
        }
      };
      if (new_thread)
        std::thread(again).join();
      else
        again();
      EXPECT_TRUE(layer.download(call) == expected);
    }
  }
}

// The whole layer and both halves in one call are the same launches where nothing is streamed.
TEST_F(LayerTest, SplitGivesTheBitsOfTheWholeWhereItIsNotStreamed) {
  for (const LayerSizes& sizes : {LayerSizes{128, 16, 512, 8, 70}, LayerSizes{144, 3, 512, 8, 70},
                                  LayerSizes{128, 4, 500, 8, 70}}) {
    LayerFixture host(sizes);
    DeviceLayer layer(host);
    layer.at(69);
    EXPECT_TRUE(layer.run(Call::fused, 69) == layer.run(Call::split, 69))
        << "hidden " << sizes.hidden << " in " << sizes.num_heads << " heads";
  }
}

// What the plain kernels are told; this needs no GPU.

cuda::PlainShape shape_of(const LayerSizes& sizes) {
  LayerSpec spec;
  spec.hidden_size = sizes.hidden;
  spec.intermediate_size = sizes.intermediate;
  spec.num_heads = sizes.num_heads;
  spec.num_kv_heads = sizes.num_kv_heads;
  spec.head_dim = sizes.head_dim();
  spec.rotary_dim = sizes.rotary_dim;
  return cuda::plain_shape(spec);
}

TEST(PlainLayer, EverySplitHasAPlaceAndEveryPositionASplit) {
  for (const LayerCase& c : layer_cases())
    for (const int sms : {1, 3, 132, 170}) {
      const cuda::PlainShape shape = shape_of(c.sizes);
      const int most = cuda::most_plain_splits(shape, c.sizes.max_positions, sms);
      for (int positions = 1; positions <= c.sizes.max_positions; ++positions) {
        const plan::AttentionSplits cut = cuda::plain_splits(shape, positions, sms);
        const int split_positions = cut.blocks_per_split * cuda::kTilePositions;
        ASSERT_LE(cut.splits, most) << c.name << ", " << positions << " positions";
        ASSERT_GE(cut.splits * split_positions, positions);
        ASSERT_LT((cut.splits - 1) * split_positions, positions);  // none is empty
      }
    }
}

TEST(PlainLayer, PartsOfTheScratchAreAlignedAndDoNotOverlap) {
  std::vector<LayerCase> cases = layer_cases();
  cases.push_back({"grouped", {960, 15, 2560, 64, 2048, 5}});
  for (const LayerCase& c : cases)
    for (const std::int64_t rows : {1, 4, 16}) {
      SCOPED_TRACE(c.name + ", rows " + std::to_string(rows));
      const cuda::PlainShape shape = shape_of(c.sizes);
      const int splits = cuda::most_plain_splits(shape, c.sizes.max_positions, 132);
      const cuda::PlainLayout layout = cuda::plain_layout(shape, rows, splits);
      const std::int64_t hidden = shape.hidden, partials = shape.heads * splits;
      std::int64_t end = 0;
      for (const auto& [begin, elements] : {std::pair{layout.positions, std::int64_t{1}},
                                            {layout.normed, hidden},
                                            {layout.post_normed, hidden},
                                            {layout.qkv, hidden + 2 * c.sizes.kv_size()},
                                            {layout.query, hidden},
                                            {layout.intermediate, c.sizes.intermediate},
                                            {layout.maxima, partials},
                                            {layout.sums, partials},
                                            {layout.outputs, partials * shape.head_dim},
                                            {layout.attention, hidden},
                                            {layout.projected, hidden}}) {
        EXPECT_GE(begin, end);
        EXPECT_EQ(begin * 4 % 16, 0);
        end = begin + rows * elements;
      }
      EXPECT_GE(layout.size, end);
    }
}

// A call with any number of rows up to 16 finds kernels for them, and few sizes of scratch.
TEST(PlainLayer, TakesAsManyTokensAtOnceAsThereAreRows) {
  for (std::int64_t rows = 1; rows <= ops::kMaxLayerRows; ++rows)
    EXPECT_GE(cuda::tokens_at_once(rows), rows);
  EXPECT_EQ(cuda::tokens_at_once(1), 1);
}

}  // namespace
}  // namespace clusterfusion::test
