// Values of the C++ API as tvm-ffi containers, and back.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "clusterfusion/engine.hpp"

namespace clusterfusion::python {

namespace ffi = tvm::ffi;

using Fields = ffi::Map<ffi::String, ffi::Any>;

inline std::string_view view_of(const ffi::Bytes& bytes) { return {bytes.data(), bytes.size()}; }

// The elements of a contiguous int32 CPU vector. Errors: wrong_type.
std::span<const TokenId> tokens_of(const ffi::TensorView& tensor);

// The elements of a contiguous, writable float32 CPU array [rows, columns].
// Errors: wrong_type, invalid_argument; `name` is the argument's.
std::span<float> matrix_of(const ffi::TensorView& tensor, std::int64_t rows, std::int64_t columns,
                           std::string_view name);

// A vector as a 1-D tensor that owns it.
template <typename T>
ffi::Tensor to_tensor(std::vector<T> values) {
  struct Owner {
    std::vector<T> values;
    void AllocData(DLTensor* tensor) { tensor->data = values.data(); }
    void FreeData(DLTensor*) {}
  };
  constexpr DLDataTypeCode kCode = std::is_floating_point_v<T> ? kDLFloat : kDLInt;
  const auto size = static_cast<std::int64_t>(values.size());
  return ffi::Tensor::FromNDAlloc(Owner{std::move(values)}, ffi::Shape({size}),
                                  DLDataType{kCode, 8 * sizeof(T), 1}, DLDevice{kDLCPU, 0});
}

GenerateRequest to_request(const Fields& fields);

// (token, logprob, ids of the most likely, their logprobs)
ffi::Array<ffi::Any> to_ffi(const SampledToken& sampled);
ffi::Array<ffi::Any> to_ffi(const ScoredToken& scored);
// (index, text, sampled token or None, name of the finish reason or None)
ffi::Array<ffi::Any> to_ffi(const GenerateEvent& event);
Fields to_ffi(const Statistics& statistics);
Fields to_ffi(const GenerateResult& result);
Fields to_ffi(const ModelConfig& config);
Fields to_ffi(const PerplexityResult& result);
Fields to_ffi(ScoreResult result);
// The likeliest tokens of all places one after the other: as many of each.
Fields to_ffi(const LoglikelihoodResult& result);

std::vector<std::vector<TokenId>> to_token_lists(const ffi::Array<ffi::Tensor>& lists);

}  // namespace clusterfusion::python
