// What the extension _eager calls in the library, which gives it the table's address: the library
// and its state are in a process once.
#pragma once

#include <string_view>

#include "layer_arguments.hpp"

namespace clusterfusion::python {

// Each of the others returns whether it did what it was asked for. If not, no tensor was written;
// the same call by the library's other functions says why.
struct EagerCalls {
  // Whether the stream is being captured in a CUDA graph, or cannot tell.
  bool (*is_capturing)(DLDevice device, void* stream) noexcept;
  bool (*find_activation)(std::string_view name, Activation& activation) noexcept;
  bool (*attention_mlp_up)(const AttentionMlpUpArguments& arguments,
                           const ops::AttentionMlpUpResults& results, void* stream) noexcept;
  bool (*mlp_down)(const MlpDownArguments& arguments, const DLTensor& output,
                   void* stream) noexcept;
  bool (*decoder_layer)(const DecoderLayerArguments& arguments,
                        const ops::DecoderLayerResults& results, void* stream) noexcept;
};

}  // namespace clusterfusion::python
