// Each argument of each call, spoiled in each way: the error names it, what was expected and found.
#include "ops/check.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "clusterfusion/error.hpp"
#include "layer_fixture.hpp"

namespace clusterfusion::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

void expect_error(ErrorKind kind, const ::testing::Matcher<std::string>& message,
                  const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_THAT(error.what(), message);
  }
}

struct Argument {
  const char* name;
  DLTensor LayerFixture::*member = nullptr;
  DLTensor ops::LayerTensors::*tensor = nullptr;
  DLTensor ops::DecoderLayerResults::*result = nullptr;
  bool optional = false;

  DLTensor& of(LayerFixture& layer) const {
    if (member != nullptr) return layer.*member;
    return tensor != nullptr ? layer.tensors.*tensor : layer.layer.*result;
  }
};

Argument input(const char* name, DLTensor ops::LayerTensors::*tensor, bool optional = false) {
  return {name, nullptr, tensor, nullptr, optional};
}
Argument result(const char* name, DLTensor ops::DecoderLayerResults::*result) {
  return {name, nullptr, nullptr, result};
}

// Of decoder_layer.
const std::vector<Argument>& arguments() {
  using T = ops::LayerTensors;
  using R = ops::DecoderLayerResults;
  static const std::vector<Argument> all = {
      input("input", &T::input),
      input("weight_qkv", &T::weight_qkv),
      input("bias_qkv", &T::bias_qkv, true),
      input("weight_o", &T::weight_o),
      input("bias_o", &T::bias_o, true),
      input("k_cache", &T::k_cache),
      input("v_cache", &T::v_cache),
      input("ln_weight", &T::ln_weight),
      input("ln_bias", &T::ln_bias),
      input("cos", &T::cos),
      input("sin", &T::sin),
      input("post_ln_weight", &T::post_ln_weight),
      input("post_ln_bias", &T::post_ln_bias),
      input("mlp_up_weight", &T::mlp_up_weight),
      input("mlp_up_bias", &T::mlp_up_bias, true),
      {"mlp_down_weight", &LayerFixture::down_weight},
      {"mlp_down_bias", &LayerFixture::down_bias, nullptr, nullptr, true},
      result("output", &R::output),
      result("k_new", &R::k_new),
      result("v_new", &R::v_new),
  };
  return all;
}

// Runs decoder_layer with one argument spoiled; nothing may have been written.
void expect_refused(const Argument& argument, ErrorKind kind, const std::string& words,
                    const std::function<void(DLTensor&)>& spoil) {
  SCOPED_TRACE(argument.name);
  LayerFixture layer;
  spoil(argument.of(layer));
  const auto keys = layer["k_cache"].bytes();
  expect_error(kind,
               AllOf(StartsWith(std::string(argument.name) + ": expected "), HasSubstr("found"),
                     HasSubstr(words)),
               [&] { layer.run_decoder_layer(); });
  EXPECT_EQ(layer["k_cache"].bytes(), keys);
}

TEST(LayerChecks, TakesGoodArguments) {
  LayerFixture layer;
  layer.run_decoder_layer();
  layer.run_decoder_layer(ops::DecoderLayerVariant::split);
  layer.run_attention_mlp_up();
  layer.run_mlp_down();
}

TEST(LayerChecks, NamesAnAbsentTensor) {
  for (const Argument& argument : arguments()) {
    if (argument.optional) continue;
    expect_refused(argument, ErrorKind::wrong_type, "found none",
                   [](DLTensor& tensor) { tensor = {}; });
  }
}

// As torch.empty(0): its data is null, and it is there all the same.
DLTensor without_elements(DLDataType dtype) {
  static std::array<std::int64_t, 1> shape{0};
  DLTensor tensor{};
  tensor.device = {kDLCPU, 0};
  tensor.ndim = 1;
  tensor.dtype = dtype;
  tensor.shape = shape.data();
  return tensor;
}

TEST(LayerChecks, TakesNoTensorWithoutElementsForAnAbsentOne) {
  for (const Argument& argument : arguments()) {
    if (argument.name == std::string("cos")) continue;  // then nothing is rotated
    expect_refused(argument, ErrorKind::invalid_argument, "found [0]",
                   [](DLTensor& tensor) { tensor = without_elements(tensor.dtype); });
  }
  const auto expect_named = [](const char* name, DLDataType dtype, auto&& tensor_of) {
    LayerFixture layer;
    tensor_of(layer.tensors) = without_elements(dtype);
    const auto message = AllOf(StartsWith(name), HasSubstr("found [0]"));
    expect_error(ErrorKind::invalid_argument, message, [&] { layer.run_decoder_layer(); });
    expect_error(ErrorKind::invalid_argument, message, [&] { layer.run_attention_mlp_up(); });
  };
  using T = ops::LayerTensors;
  const DLDataType int32{kDLInt, 32, 1}, float16{kDLFloat, 16, 1};
  expect_named("current_seq_len: ", int32,
               [](T& t) -> DLTensor& { return t.current_seq_len.tensor; });
  expect_named("q_norm_weight: ", float16, [](T& t) -> DLTensor& { return t.q_norm_weight; });
}

TEST(LayerChecks, TakesNoPagesWithoutPositions) {
  LayerSizes sizes;
  LayerFixture layer(sizes);
  OwnedTensor table({kDLInt, 32, 1}, {1, 1});
  std::array<std::int64_t, 4> shape{1, 0, sizes.num_heads, sizes.head_dim()};
  layer.tensors.block_table = table.view();
  for (DLTensor* cache : {&layer.tensors.k_cache, &layer.tensors.v_cache}) {
    cache->data = nullptr;
    cache->shape = shape.data();
    cache->ndim = 4;
  }
  expect_error(ErrorKind::invalid_argument,
               StartsWith("k_cache: expected pages of 16, 32 or 64 positions, found shape [1, 0"),
               [&] { layer.run_decoder_layer(); });
}

TEST(LayerChecks, LetsBiasesOfMatricesBeAbsent) {
  LayerFixture layer;
  layer.tensors.bias_qkv = {};
  layer.tensors.bias_o = {};
  layer.tensors.mlp_up_bias = {};
  layer.down_bias = layer.down.mlp_down_bias = {};
  layer.run_decoder_layer();
  layer.run_attention_mlp_up();
  layer.run_mlp_down();
}

TEST(LayerChecks, NamesAWrongDtype) {
  for (const Argument& argument : arguments()) {
    const bool wide = argument.name == std::string("cos") || argument.name == std::string("sin");
    expect_refused(argument, ErrorKind::wrong_type, wide ? "found float64" : "found int16",
                   [&](DLTensor& tensor) {
                     tensor.dtype = wide ? DLDataType{kDLFloat, 64, 1} : DLDataType{kDLInt, 16, 1};
                   });
  }
}

// By DLPack's numbers, which its older headers do not name: the dtype of a quantised cache.
TEST(LayerChecks, NamesNewerDtypes) {
  const auto expect_named = [](DLDataType dtype, const char* found) {
    LayerFixture layer;
    layer.tensors.k_cache.dtype = dtype;
    expect_error(ErrorKind::wrong_type, AllOf(StartsWith("k_cache: "), HasSubstr(found)),
                 [&] { layer.run_decoder_layer(); });
  };
  expect_named({6, 8, 1}, "found bool8");
  expect_named({7, 8, 1}, "found float8_e3m4");
  expect_named({10, 8, 1}, "found float8_e4m3fn");
  expect_named({12, 8, 2}, "found float8_e5m2x2");
  expect_named({14, 8, 1}, "found float8_e8m0fnu");
  expect_named({17, 4, 2}, "found DLPack type 17 of 4 bitsx2");
}

TEST(LayerChecks, NamesTheOther16BitType) {
  for (const Argument& argument : arguments()) {
    if (argument.name == std::string("input")) continue;  // whose dtype is that of all
    expect_refused(argument, ErrorKind::wrong_type, "found bfloat16", [](DLTensor& tensor) {
      tensor.dtype = {kDLBfloat, 16, 1};
    });
  }
}

TEST(LayerChecks, NamesAWrongShape) {
  for (const Argument& argument : arguments()) {
    std::vector<std::int64_t> shape;
    expect_refused(argument, ErrorKind::invalid_argument, "found [", [&](DLTensor& tensor) {
      shape.assign(tensor.shape, tensor.shape + tensor.ndim);
      shape.back() += 1;
      if (argument.name == std::string("input")) shape = {2, shape.back() - 1};
      tensor.shape = shape.data();
    });
  }
}

TEST(LayerChecks, NamesAWrongNumberOfDimensions) {
  for (const Argument& argument : arguments()) {
    std::vector<std::int64_t> shape;
    expect_refused(argument, ErrorKind::invalid_argument, "found [2, ", [&](DLTensor& tensor) {
      shape.assign(tensor.shape, tensor.shape + tensor.ndim);
      shape.insert(shape.begin(), 2);
      tensor.shape = shape.data();
      tensor.ndim += 1;
    });
  }
}

TEST(LayerChecks, NamesAnotherDevice) {
  for (const Argument& argument : arguments()) {
    if (argument.name == std::string("input")) continue;  // whose device is that of all
    expect_refused(argument, ErrorKind::invalid_argument, "found cuda:1", [](DLTensor& tensor) {
      tensor.device = {kDLCUDA, 1};
    });
  }
}

TEST(LayerChecks, NamesAMisalignedTensor) {
  for (const Argument& argument : arguments()) {
    expect_refused(argument, ErrorKind::invalid_argument, "2 bytes past",
                   [](DLTensor& tensor) { tensor.byte_offset = 2; });
  }
}

TEST(LayerChecks, NamesATransposedTensor) {
  for (const Argument& argument : arguments()) {
    std::vector<std::int64_t> strides;
    expect_refused(argument, ErrorKind::invalid_argument, "found strides [", [&](DLTensor& tensor) {
      // Columns lie next to each other; a vector has gaps.
      strides.assign(static_cast<std::size_t>(tensor.ndim), 2);
      tensor.strides = strides.data();
    });
  }
}

TEST(LayerChecks, IgnoresStridesOfDimensionsOfOne) {
  LayerFixture layer;
  std::array<std::int64_t, 2> strides{7, 1};
  layer.tensors.input.strides = strides.data();
  layer.run_decoder_layer();
}

TEST(LayerChecks, TakesLeadingDimensionsOfOne) {
  LayerFixture layer;
  std::array<std::int64_t, 3> shape{1, 1, layer.sizes.hidden};
  layer.tensors.input.shape = layer.layer.output.shape = shape.data();
  layer.tensors.input.ndim = layer.layer.output.ndim = 3;
  std::array<std::int64_t, 2> row{1, layer.sizes.rotary_dim};
  layer.tensors.cos.shape = layer.tensors.sin.shape = row.data();
  layer.tensors.cos.ndim = layer.tensors.sin.ndim = 2;
  layer.run_decoder_layer();
}

TEST(LayerChecks, RefusesOverlap) {
  {
    LayerFixture layer;
    layer.tensors.v_cache.data = layer.tensors.k_cache.data;
    expect_error(
        ErrorKind::invalid_argument,
        AllOf(StartsWith("k_cache: expected memory of its own"), HasSubstr("overlaps v_cache")),
        [&] { layer.run_decoder_layer(); });
  }
  {
    LayerFixture layer;
    layer.layer.output = layer.tensors.input;
    expect_error(ErrorKind::invalid_argument,
                 AllOf(StartsWith("output: "), HasSubstr("overlaps input")),
                 [&] { layer.run_decoder_layer(); });
  }
  {
    LayerFixture layer;
    layer.attention.k_new.data =
        static_cast<std::byte*>(layer.attention.v_new.data) + 16;  // within v_new
    expect_error(ErrorKind::invalid_argument, HasSubstr("overlaps"),
                 [&] { layer.run_attention_mlp_up(); });
  }
}

TEST(LayerChecks, RefusesPositionsOutsideTheCaches) {
  for (const std::int64_t position : {std::int64_t{-1}, std::int64_t{8}, std::int64_t{9},
                                      std::numeric_limits<std::int64_t>::min()}) {
    LayerFixture layer;
    layer.tensors.current_seq_len.value = position;
    expect_error(
        ErrorKind::invalid_argument,
        AllOf(StartsWith("current_seq_len: expected 0 to 7"), HasSubstr(std::to_string(position)),
              HasSubstr(position == 8 ? "full" : "because the caches have 8")),
        [&] { layer.run_decoder_layer(); });
  }
}

TEST(LayerChecks, ReadsThePositionFromATensor) {
  LayerFixture number, tensor;
  OwnedTensor position({kDLInt, 32, 1}, {1});
  position.as<std::int32_t>()[0] = 5;
  number.tensors.current_seq_len.value = 5;
  tensor.tensors.current_seq_len = {99, position.view()};
  number.run_decoder_layer();
  tensor.run_decoder_layer();
  EXPECT_EQ(number["output"].bytes(), tensor["output"].bytes());

  tensor.tensors.current_seq_len.tensor.ndim = 0;
  tensor.run_decoder_layer();

  position.as<std::int32_t>()[0] = 8;
  expect_error(ErrorKind::invalid_argument, HasSubstr("full"), [&] { tensor.run_decoder_layer(); });
  tensor.tensors.current_seq_len.tensor.dtype = {kDLInt, 64, 1};
  expect_error(ErrorKind::wrong_type,
               AllOf(StartsWith("current_seq_len: expected dtype int32"), HasSubstr("int64")),
               [&] { tensor.run_decoder_layer(); });
}

TEST(LayerChecks, RefusesImpossibleOptions) {
  for (const std::int64_t heads : {0, -4, 5, 64}) {
    LayerFixture layer;
    layer.options.num_heads = heads;
    expect_error(ErrorKind::invalid_argument,
                 AllOf(StartsWith("num_heads: expected a divisor of the hidden size 32"),
                       HasSubstr(std::to_string(heads))),
                 [&] { layer.run_decoder_layer(); });
  }
  for (const std::int64_t heads : {0, -1, 3, 8}) {
    LayerFixture layer;
    layer.options.num_kv_heads = heads;
    expect_error(ErrorKind::invalid_argument,
                 AllOf(StartsWith("num_kv_heads: expected a divisor of num_heads (4)"),
                       HasSubstr(std::to_string(heads))),
                 [&] { layer.run_decoder_layer(); });
  }
  for (const double eps : {-1e-5, std::nan(""), std::numeric_limits<double>::infinity()}) {
    LayerFixture layer;
    layer.options.layer_norm_eps = eps;
    expect_error(ErrorKind::invalid_argument, StartsWith("layer_norm_eps: expected a finite"),
                 [&] { layer.run_decoder_layer(); });
  }
  for (const std::int64_t rotary_dim : {-2, 3, 10}) {
    LayerFixture layer;
    layer.options.rotary_dim = rotary_dim;
    expect_error(ErrorKind::invalid_argument,
                 StartsWith("rotary_dim: expected an even number of 0 to 8 (head_dim)"),
                 [&] { layer.run_decoder_layer(); });
  }
}

TEST(LayerChecks, WantsToKnowHowMuchOfAPaddedTableCounts) {
  LayerSizes sizes;
  sizes.rotary_dim = sizes.head_dim();  // as long as a table that is padded to head_dim
  LayerFixture layer(sizes);
  expect_error(ErrorKind::invalid_argument, StartsWith("rotary_dim: expected a number"),
               [&] { layer.run_decoder_layer(); });
  layer.options.rotary_dim = 4;
  layer.run_decoder_layer();
  layer.options.rotary_dim = sizes.head_dim();
  layer.run_decoder_layer();
}

TEST(LayerChecks, ComparesWithExpectedSizes) {
  LayerFixture layer;
  expect_error(ErrorKind::invalid_argument,
               AllOf(StartsWith("input: expected shape [1, 2560]"), HasSubstr("found [1, 32]")),
               [&] {
                 ops::decoder_layer(layer.tensors, layer.down_weight, layer.down_bias,
                                    layer.options, layer.layer, {}, nullptr, {2560, 10240});
               });
  expect_error(
      ErrorKind::invalid_argument,
      AllOf(StartsWith("mlp_up_weight: expected shape [10240, 32]"), HasSubstr("found [48, 32]")),
      [&] {
        ops::attention_mlp_up(layer.tensors, layer.options, layer.attention, nullptr, {32, 10240});
      });
  expect_error(
      ErrorKind::invalid_argument,
      AllOf(StartsWith("mlp_intermediate: expected shape [10240]"), HasSubstr("found [48]")), [&] {
        ops::mlp_down(layer.down, layer.down_output, nullptr, {32, 10240});
      });
}

TEST(LayerChecks, ChecksMlpDown) {
  using T = ops::MlpDownTensors;
  const std::pair<const char*, DLTensor T::*> tensors[] = {
      {"hidden_states", &T::hidden_states},
      {"attn_output", &T::attn_output},
      {"mlp_intermediate", &T::mlp_intermediate},
      {"mlp_down_weight", &T::mlp_down_weight},
      {"mlp_down_bias", &T::mlp_down_bias}};
  for (const auto& [name, member] : tensors) {
    LayerFixture layer;
    if (name != std::string("mlp_down_bias")) {
      layer.down.*member = {};
      expect_error(ErrorKind::wrong_type, AllOf(StartsWith(name), HasSubstr("found none")),
                   [&] { layer.run_mlp_down(); });
      layer.fill_views();
    }
    (layer.down.*member).byte_offset = 8;
    expect_error(ErrorKind::invalid_argument, AllOf(StartsWith(name), HasSubstr("8 bytes past")),
                 [&] { layer.run_mlp_down(); });
  }
  LayerFixture layer;
  std::array<std::int64_t, 2> empty{layer.sizes.hidden, 0};
  layer.down.mlp_intermediate.shape = &empty[1];
  expect_error(ErrorKind::invalid_argument, StartsWith("mlp_intermediate: expected shape"),
               [&] { layer.run_mlp_down(); });
}

TEST(LayerChecks, LeavesAPositionOnTheGpuUnread) {
  LayerFixture layer;
  for (const Argument& argument : arguments()) argument.of(layer).device = {kDLCUDA, 1};
  std::array<std::int64_t, 1> one{1};
  DLTensor& position = layer.tensors.current_seq_len.tensor;
  position.data = reinterpret_cast<void*>(0x1000);
  position.dtype = {kDLInt, 32, 1};
  position.shape = one.data();
  position.ndim = 1;
  expect_error(ErrorKind::invalid_argument,
               AllOf(StartsWith("current_seq_len: expected device cuda:1"), HasSubstr("found cpu")),
               [&] {
                 position.device = {kDLCPU, 0};
                 layer.run_decoder_layer();
               });
  position.device = {kDLCUDA, 1};
  const auto checked = ops::check(layer.tensors, layer.down_weight, layer.down_bias, layer.options,
                                  {}, &layer.layer);
  EXPECT_EQ(checked.device.device_type, kDLCUDA);
  EXPECT_EQ(checked.device.device_id, 1);
  EXPECT_EQ(checked.work.positions, position.data);
  EXPECT_EQ(checked.work.cache.page_size, layer.sizes.max_positions);
}

TEST(LayerChecks, RefusesOtherDevices) {
  LayerFixture layer;
  layer.tensors.input.device = {kDLMetal, 0};
  expect_error(ErrorKind::unsupported, StartsWith("input: expected a tensor in CPU or CUDA memory"),
               [&] { layer.run_decoder_layer(); });
}

#ifndef CLUSTERFUSION_WITH_CUDA
TEST(LayerChecks, SaysThatTheBuildHasNoCudaKernels) {
  LayerFixture layer;
  for (const Argument& argument : arguments()) argument.of(layer).device = {kDLCUDA, 1};
  expect_error(ErrorKind::unsupported, AllOf(HasSubstr("on cuda:1"), HasSubstr("no CUDA kernels")),
               [&] { layer.run_decoder_layer(); });
}
#endif

}  // namespace
}  // namespace clusterfusion::test
