#include "clusterfusion/ops.hpp"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <optional>
#include <string>

#include "base/fail.hpp"
#include "export.hpp"
#include "model/config_reader.hpp"
#include "objects.hpp"
#include "ops/check.hpp"

namespace clusterfusion::python {
namespace {

// What Python calls the type of a value.
std::string type_text(const ffi::AnyView& value) {
  switch (value.type_index()) {
    case ffi::TypeIndex::kTVMFFISmallStr:
    case ffi::TypeIndex::kTVMFFIStr: return "str";
    case ffi::TypeIndex::kTVMFFISmallBytes:
    case ffi::TypeIndex::kTVMFFIBytes: return "bytes";
    case ffi::TypeIndex::kTVMFFIArray: return "list or tuple";
    case ffi::TypeIndex::kTVMFFIMap: return "dict";
    case ffi::TypeIndex::kTVMFFIBigInt: return "int of more than 64 bits";
    case ffi::TypeIndex::kTVMFFITensor:
    case ffi::TypeIndex::kTVMFFIDLTensorPtr: return "tensor";
    case ffi::TypeIndex::kTVMFFIOpaquePyObject: return "an object that is no tensor";
    default: return value.GetTypeKey();
  }
}

// The arguments of a call, taken one after the other by name. None is a tensor that is not there.
class Arguments {
 public:
  explicit Arguments(ffi::PackedArgs packed) : packed_(packed) {}

  bool at_end() const { return next_ == packed_.size(); }

  DLTensor tensor(const char* name) {
    const ffi::AnyView value = next();
    if (value.type_index() == ffi::TypeIndex::kTVMFFINone) return {};
    if (const auto tensor = value.try_cast<DLTensor*>()) return **tensor;
    refuse(value, name, "a tensor");
  }

  ops::Position position(const char* name) {
    const ffi::AnyView value = next();
    if (const auto tensor = value.try_cast<DLTensor*>()) return {0, **tensor};
    return {integer_of(value, name, "an integer or an int32 tensor of one element"), {}};
  }

  std::int64_t integer(const char* name) { return integer_of(next(), name, "an integer"); }

  std::optional<std::int64_t> optional_integer(const char* name) {
    const ffi::AnyView value = next();
    if (value.type_index() == ffi::TypeIndex::kTVMFFINone) return std::nullopt;
    return integer_of(value, name, "an integer or None");
  }

  double number(const char* name) {
    const ffi::AnyView value = next();
    const int type = value.type_index();
    if (type == ffi::TypeIndex::kTVMFFIFloat || type == ffi::TypeIndex::kTVMFFIInt) {
      return value.cast<double>();
    }
    refuse(value, name, "a number");
  }

  bool boolean(const char* name) {
    const ffi::AnyView value = next();
    if (value.type_index() == ffi::TypeIndex::kTVMFFIBool) return value.cast<bool>();
    refuse(value, name, "bool");
  }

  std::string text(const char* name) {
    const ffi::AnyView value = next();
    if (const auto text = value.try_cast<ffi::String>()) return *text;
    refuse(value, name, "str");
  }

 private:
  ffi::AnyView next() {
    require(!at_end(), ErrorKind::internal, "a layer call got {} arguments, which are too few",
            packed_.size());
    return packed_[next_++];
  }

  static std::int64_t integer_of(const ffi::AnyView& value, const char* name,
                                 const char* expected) {
    if (value.type_index() == ffi::TypeIndex::kTVMFFIInt) return value.cast<std::int64_t>();
    refuse(value, name, expected);
  }

  [[noreturn]] static void refuse(const ffi::AnyView& value, const char* name,
                                  const char* expected) {
    fail(ErrorKind::wrong_type, "{}: expected {}, found {}", name, expected, type_text(value));
  }

  ffi::PackedArgs packed_;
  int next_ = 0;
};

// The stream that the caller's framework works on: tvm-ffi has asked it while it took the tensors.
void* stream_of(const DLTensor& tensor) {
  if (tensor.device.device_type == kDLCPU) return nullptr;
  return TVMFFIEnvGetStream(tensor.device.device_type, tensor.device.device_id);
}

ops::LayerTensors layer_tensors(Arguments& in) {
  ops::LayerTensors tensors;
  tensors.input = in.tensor("input");
  tensors.weight_qkv = in.tensor("weight_qkv");
  tensors.bias_qkv = in.tensor("bias_qkv");
  tensors.weight_o = in.tensor("weight_o");
  tensors.bias_o = in.tensor("bias_o");
  tensors.k_cache = in.tensor("k_cache");
  tensors.v_cache = in.tensor("v_cache");
  tensors.ln_weight = in.tensor("ln_weight");
  tensors.ln_bias = in.tensor("ln_bias");
  tensors.cos = in.tensor("cos");
  tensors.sin = in.tensor("sin");
  tensors.post_ln_weight = in.tensor("post_ln_weight");
  tensors.post_ln_bias = in.tensor("post_ln_bias");
  tensors.mlp_up_weight = in.tensor("mlp_up_weight");
  tensors.mlp_up_bias = in.tensor("mlp_up_bias");
  return tensors;
}

ops::LayerOptions layer_options(Arguments& in) {
  ops::LayerOptions options;
  options.num_heads = in.integer("num_heads");
  options.rotary_dim = in.optional_integer("rotary_dim");
  options.layer_norm_eps = in.number("layer_norm_eps");
  options.activation = parse_activation(in.text("activation"), "activation:");
  return options;
}

ops::ExpectedSizes expected_sizes(Arguments& in) {
  return {in.integer("hidden_size"), in.integer("intermediate_size")};
}

// Each call: tensors in the order of the Python function, position, options, expected sizes,
// results. Without results it only checks.

void ops_attention_mlp_up(ffi::PackedArgs packed) {
  Arguments in(packed);
  ops::LayerTensors tensors = layer_tensors(in);
  tensors.current_seq_len = in.position("current_seq_len");
  const ops::LayerOptions options = layer_options(in);
  const ops::ExpectedSizes expected = expected_sizes(in);
  if (in.at_end()) return static_cast<void>(check(tensors, options, expected, nullptr));
  ops::AttentionMlpUpResults results;
  results.attn_output = in.tensor("attn_output");
  results.mlp_intermediate = in.tensor("mlp_intermediate");
  results.k_new = in.tensor("k_new");
  results.v_new = in.tensor("v_new");
  attention_mlp_up(tensors, options, results, stream_of(tensors.input), expected);
}

void ops_mlp_down(ffi::PackedArgs packed) {
  Arguments in(packed);
  ops::MlpDownTensors tensors;
  tensors.hidden_states = in.tensor("hidden_states");
  tensors.attn_output = in.tensor("attn_output");
  tensors.mlp_intermediate = in.tensor("mlp_intermediate");
  tensors.mlp_down_weight = in.tensor("mlp_down_weight");
  tensors.mlp_down_bias = in.tensor("mlp_down_bias");
  const ops::ExpectedSizes expected = expected_sizes(in);
  if (in.at_end()) return static_cast<void>(check(tensors, expected, nullptr));
  mlp_down(tensors, in.tensor("output"), stream_of(tensors.hidden_states), expected);
}

void ops_decoder_layer(ffi::PackedArgs packed) {
  Arguments in(packed);
  ops::LayerTensors tensors = layer_tensors(in);
  const DLTensor down_weight = in.tensor("mlp_down_weight");
  const DLTensor down_bias = in.tensor("mlp_down_bias");
  tensors.current_seq_len = in.position("current_seq_len");
  const ops::LayerOptions options = layer_options(in);
  const bool split = in.boolean("split");
  const ops::ExpectedSizes expected = expected_sizes(in);
  if (in.at_end()) {
    return static_cast<void>(check(tensors, down_weight, down_bias, options, expected, nullptr));
  }
  ops::DecoderLayerResults results;
  results.output = in.tensor("output");
  results.k_new = in.tensor("k_new");
  results.v_new = in.tensor("v_new");
  decoder_layer(tensors, down_weight, down_bias, options, results,
                split ? ops::DecoderLayerVariant::split : ops::DecoderLayerVariant::fused,
                stream_of(tensors.input), expected);
}

void ops_check_graph_context(ffi::PackedArgs packed) {
  Arguments in(packed);
  ops::LayerTensors tensors;
  tensors.k_cache = in.tensor("k_cache");
  tensors.v_cache = in.tensor("v_cache");
  tensors.weight_qkv = in.tensor("weight_qkv");
  tensors.weight_o = in.tensor("weight_o");
  tensors.mlp_up_weight = in.tensor("mlp_up_weight");
  const DLTensor down_weight = in.tensor("mlp_down_weight");
  check_graph_context(tensors, down_weight, expected_sizes(in));
}

// The same memory, its 16-bit integers taken as bfloat16, which NumPy's DLPack does not know.
ffi::Tensor ops_as_bfloat16(ffi::Tensor bits) {
  struct View {
    ffi::Tensor bits;
    void AllocData(DLTensor* tensor) {
      tensor->data = bits.data_ptr();
      tensor->byte_offset = bits.byte_offset();
    }
    void FreeData(DLTensor*) {}
  };
  const DLDataType dtype = bits.dtype();
  require(dtype.code == kDLUInt && dtype.bits == 16 && dtype.lanes == 1, ErrorKind::wrong_type,
          "bfloat16 arrays come as uint16, found DLPack type code {} with {} bits",
          static_cast<int>(dtype.code), static_cast<int>(dtype.bits));
  return ffi::Tensor::FromNDAllocStrided(View{bits}, bits.shape(), bits.strides(),
                                         DLDataType{kDLBfloat, 16, 1}, bits.device());
}

CLUSTERFUSION_EXPORT(ops_as_bfloat16)

}  // namespace

CLUSTERFUSION_EXPORT_PACKED(ops_attention_mlp_up)
CLUSTERFUSION_EXPORT_PACKED(ops_mlp_down)
CLUSTERFUSION_EXPORT_PACKED(ops_decoder_layer)
CLUSTERFUSION_EXPORT_PACKED(ops_check_graph_context)

}  // namespace clusterfusion::python
