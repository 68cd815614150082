#include "clusterfusion/ops.hpp"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/fail.hpp"
#include "export.hpp"
#include "layer_arguments.hpp"
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
  // `general`: the position may come by another name as well.
  explicit Arguments(ffi::PackedArgs packed, bool general = false)
      : packed_(packed), general_(general) {}

  bool at_end() const { return next_ == packed_.size(); }

  DLTensor tensor(const char* name) {
    const ffi::AnyView value = next();
    if (value.type_index() == ffi::TypeIndex::kTVMFFINone) return {};
    if (const auto tensor = value.try_cast<DLTensor*>()) return **tensor;
    refuse(value, name, "a tensor");
  }

  ops::Position position(const char* name) {
    const ffi::AnyView value = next();
    has_position_ = !general_ || value.type_index() != ffi::TypeIndex::kTVMFFINone;
    if (!has_position_) return {};
    if (const auto tensor = value.try_cast<DLTensor*>()) return {0, **tensor, name};
    return {integer_of(value, name, "an integer or an int32 tensor of one element"), {}, name};
  }

  // Instead of position(), if that was None; one of the two must be there.
  void other_position(const char* name, ops::Position& position) {
    const ffi::AnyView value = next();
    const bool is_there = value.type_index() != ffi::TypeIndex::kTVMFFINone;
    require(
        is_there || has_position_, ErrorKind::wrong_type,
        "current_seq_len: expected an integer or an int32 tensor, or that {} is one, found None",
        name);
    require(!is_there || !has_position_, ErrorKind::wrong_type,
            "{}: expected None beside current_seq_len, which says the same, found {}", name,
            type_text(value));
    if (!is_there) return;
    const auto tensor = value.try_cast<DLTensor*>();
    position =
        tensor ? ops::Position{0, **tensor, name}
               : ops::Position{integer_of(value, name, "an integer or an int32 tensor"), {}, name};
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

  NormKind norm(const char* name) {
    const ffi::AnyView value = next();
    const auto text = value.try_cast<ffi::String>();
    if (!text) refuse(value, name, "str");
    const std::string_view kind(text->data(), text->size());
    require(kind == "layer" || kind == "rms", ErrorKind::invalid_argument,
            "{}: expected \"layer\" or \"rms\", found \"{}\"", name, kind);
    return kind == "rms" ? NormKind::rms_norm : NormKind::layer_norm;
  }

  Activation activation(const char* name) {
    const ffi::AnyView value = next();
    const auto text = value.try_cast<ffi::String>();
    if (!text) refuse(value, name, "str");
    return parse_activation(std::string_view(text->data(), text->size()), "activation:");
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
  bool general_;
  bool has_position_ = false;
  int next_ = 0;
};

// The stream that the caller's framework works on: tvm-ffi has asked it while it took the tensors.
void* stream_of(const DLTensor& tensor) {
  if (tensor.device.device_type == kDLCPU) return nullptr;
  return TVMFFIEnvGetStream(tensor.device.device_type, tensor.device.device_id);
}

// Each call without results only checks.

enum class Options { usual, all };  // that are passed

void attention_mlp_up_of(ffi::PackedArgs packed, Options passed) {
  Arguments in(packed, passed == Options::all);
  AttentionMlpUpArguments given;
  read(in, given);
  if (passed == Options::all) read_more(in, given.tensors, given.options);
  if (in.at_end()) {
    return static_cast<void>(check(given.tensors, given.options, given.expected, nullptr));
  }
  ops::AttentionMlpUpResults results;
  read(in, results);
  attention_mlp_up(given.tensors, given.options, results, stream_of(given.tensors.input),
                   given.expected);
}

void ops_attention_mlp_up(ffi::PackedArgs packed) { attention_mlp_up_of(packed, Options::usual); }

void ops_general_attention_mlp_up(ffi::PackedArgs packed) {
  attention_mlp_up_of(packed, Options::all);
}

void ops_mlp_down(ffi::PackedArgs packed) {
  Arguments in(packed);
  MlpDownArguments given;
  read(in, given);
  if (in.at_end()) return static_cast<void>(check(given.tensors, given.expected, nullptr));
  mlp_down(given.tensors, in.tensor("output"), stream_of(given.tensors.hidden_states),
           given.expected);
}

void decoder_layer_of(ffi::PackedArgs packed, Options passed) {
  Arguments in(packed, passed == Options::all);
  DecoderLayerArguments given;
  read(in, given);
  if (passed == Options::all) read_more(in, given.tensors, given.options);
  if (in.at_end()) {
    return static_cast<void>(check(given.tensors, given.mlp_down_weight, given.mlp_down_bias,
                                   given.options, given.expected, nullptr));
  }
  ops::DecoderLayerResults results;
  read(in, results);
  decoder_layer(given.tensors, given.mlp_down_weight, given.mlp_down_bias, given.options, results,
                given.variant, stream_of(given.tensors.input), given.expected);
}

void ops_decoder_layer(ffi::PackedArgs packed) { decoder_layer_of(packed, Options::usual); }

void ops_general_decoder_layer(ffi::PackedArgs packed) { decoder_layer_of(packed, Options::all); }

void ops_check_graph_context(ffi::PackedArgs packed) {
  Arguments in(packed);
  ops::LayerTensors tensors;
  tensors.k_cache = in.tensor("k_cache");
  tensors.v_cache = in.tensor("v_cache");
  tensors.weight_qkv = in.tensor("weight_qkv");
  tensors.weight_o = in.tensor("weight_o");
  tensors.mlp_up_weight = in.tensor("mlp_up_weight");
  const DLTensor down_weight = in.tensor("mlp_down_weight");
  ops::ExpectedSizes expected;
  read(in, expected);
  check_graph_context(tensors, down_weight, expected);
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
  const std::int64_t none = 0;  // an array without dimensions comes without strides
  const ffi::ShapeView strides = bits.ndim() == 0 ? ffi::ShapeView(&none, 0) : bits.strides();
  return ffi::Tensor::FromNDAllocStrided(View{bits}, bits.shape(), strides,
                                         DLDataType{kDLBfloat, 16, 1}, bits.device());
}

CLUSTERFUSION_EXPORT(ops_as_bfloat16)

}  // namespace

CLUSTERFUSION_EXPORT_PACKED(ops_attention_mlp_up)
CLUSTERFUSION_EXPORT_PACKED(ops_mlp_down)
CLUSTERFUSION_EXPORT_PACKED(ops_decoder_layer)
CLUSTERFUSION_EXPORT_PACKED(ops_general_attention_mlp_up)
CLUSTERFUSION_EXPORT_PACKED(ops_general_decoder_layer)
CLUSTERFUSION_EXPORT_PACKED(ops_check_graph_context)

}  // namespace clusterfusion::python
