// What is computed for a layer, as data: steps in an order that keeps every dependency. All that
// computes layers walks it, each in its own way: the executors choose which steps run side by side,
// the program says which may. Plain C++: no CUDA here, so every promise is tested on any machine.
//
// Adding a norm, an activation or another kind of MLP is a step or an epilogue here, and its
// arithmetic in each executor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/layer_spec.hpp"

namespace clusterfusion::plan {

// Where a step's input and output lie: of each row (token) a vector of width_of(place) values.
enum class Place {
  residual,      // the residual stream
  attention_in,  // normalised for attention
  mlp_in,        // normalised for the MLP
  qkv,           // for each head of keys and values: its queries, its key, its value
  queries,       // where QkvLayout keeps the matrices apart, heads one after the other; so are
  keys,          // keys
  values,        // and values
  heads,         // what the heads give, one after the other
  gate,          // of a gated MLP, after the activation
  mlp,           // the MLP's activations
};
inline constexpr std::size_t kNumPlaces = 10;

std::int64_t width_of(Place place, const LayerSpec& spec) noexcept;

enum class Operation {
  norm,       // output = norm of input, by the layer's norm kind
  product,    // output = weight x input + bias, then the epilogue
  attention,  // normalises queries and keys if LayerSpec::qk_norm, rotates them, stores keys and
              // values, output = softmax(q k) v, causal. Its input is Place::qkv, or Place::queries
              // for that and keys and values
};

// What becomes of a product's result. Each value's depends on that value alone.
enum class Epilogue {
  none,
  activate,       // output = activation(result)
  times_gate,     // output = Place::gate x result
  add_to_output,  // output += result, in the order of the program
};

struct Step {
  Operation operation = Operation::norm;
  LayerTensor
      weight{};  // of a norm or a product; its bias is bias_of(weight), if the layer has one
  Place input{}, output{};
  Epilogue epilogue = Epilogue::none;
  bool of_mlp = false;      // else of attention
  std::uint32_t after = 0;  // bit i: step i must be done before this one begins

  bool waits_for(std::size_t step) const noexcept { return (after >> step & 1) != 0; }
};

using LayerProgram = std::vector<Step>;

// A part of a layer. What it adds to the residual stream is the caller's to add or to hand on.
enum class Part {
  whole,
  attention_and_mlp_up,  // all but MLP-down: what comes before the first sum of a parallel layer
  mlp_down,
  attention,  // from its norm to its output projection
  mlp,        // from its norm to MLP-down
};

LayerProgram make_layer_program(const LayerSpec& spec, Part part = Part::whole);

// The steps of `program` in another order that keeps every dependency: the MLP's as early as they
// can be, behind the norms.
LayerProgram mlp_first(const LayerProgram& program);

// Steps that follow each other and can be shared out together: of one operation, and none reads as
// its input what another of them gives. Their epilogues may wait for each other: value by value.
std::vector<std::span<const Step>> phases_of(const LayerProgram& program);

}  // namespace clusterfusion::plan
