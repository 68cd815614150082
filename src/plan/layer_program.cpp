#include "plan/layer_program.hpp"

#include <algorithm>

namespace clusterfusion::plan {
namespace {

bool reads(const Step& step, Place place) {
  const bool attends_apart = step.operation == Operation::attention && step.input == Place::queries;
  return step.input == place || (step.epilogue == Epilogue::times_gate && place == Place::gate) ||
         (step.epilogue == Epilogue::add_to_output && place == step.output) ||
         (attends_apart && (place == Place::keys || place == Place::values));
}

// Whether one of the two reads or writes what the other writes.
bool conflict(const Step& a, const Step& b) {
  return a.output == b.output || reads(a, b.output) || reads(b, a.output);
}

LayerProgram with_dependencies(LayerProgram steps) {
  for (std::size_t j = 0; j < steps.size(); ++j) {
    steps[j].after = 0;
    for (std::size_t i = 0; i < j; ++i) {
      if (conflict(steps[i], steps[j])) steps[j].after |= 1u << i;
    }
  }
  return steps;
}

Step norm(LayerTensor weight, Place output) {
  return {Operation::norm, weight,         Place::residual,
          output,          Epilogue::none, output == Place::mlp_in};
}

Step product(LayerTensor weight, Place input, Place output, Epilogue epilogue, bool of_mlp) {
  return {Operation::product, weight, input, output, epilogue, of_mlp};
}

LayerProgram whole_layer(const LayerSpec& spec) {
  const Step input_norm = norm(LayerTensor::input_norm_weight, Place::attention_in);
  const Step post_norm = norm(LayerTensor::post_norm_weight, Place::mlp_in);
  const bool is_separate = spec.qkv_layout == QkvLayout::separate;
  const auto projection = [](LayerTensor weight, Place output) {
    return product(weight, Place::attention_in, output, Epilogue::none, false);
  };
  const LayerProgram qkv = is_separate
                               ? LayerProgram{projection(LayerTensor::query_weight, Place::queries),
                                              projection(LayerTensor::key_weight, Place::keys),
                                              projection(LayerTensor::value_weight, Place::values)}
                               : LayerProgram{projection(LayerTensor::qkv_weight, Place::qkv)};
  const Step attention{
      Operation::attention, {}, is_separate ? Place::queries : Place::qkv, Place::heads};
  const Step attention_out = product(LayerTensor::attention_out_weight, Place::heads,
                                     Place::residual, Epilogue::add_to_output, false);
  const Step gate =
      product(LayerTensor::mlp_gate_weight, Place::mlp_in, Place::gate, Epilogue::activate, true);
  const Step up = product(LayerTensor::mlp_up_weight, Place::mlp_in, Place::mlp,
                          spec.gated_mlp ? Epilogue::times_gate : Epilogue::activate, true);
  const Step down = product(LayerTensor::mlp_down_weight, Place::mlp, Place::residual,
                            Epilogue::add_to_output, true);
  LayerProgram program =
      spec.parallel_residual
          ? LayerProgram{input_norm, post_norm, gate, up, attention, down, attention_out}
          : LayerProgram{input_norm, attention, attention_out, post_norm, gate, up, down};
  program.insert(program.begin() + (spec.parallel_residual ? 2 : 1), qkv.begin(), qkv.end());
  if (!spec.gated_mlp) {
    std::erase_if(program, [](const Step& s) { return s.weight == LayerTensor::mlp_gate_weight; });
  }
  return program;
}

bool is_in(const Step& step, Part part) {
  const bool is_down =
      step.operation == Operation::product && step.weight == LayerTensor::mlp_down_weight;
  switch (part) {
    case Part::whole: return true;
    case Part::attention_and_mlp_up: return !is_down;
    case Part::mlp_down: return is_down;
    case Part::attention: return !step.of_mlp;
    case Part::mlp: return step.of_mlp;
  }
  return false;
}

}  // namespace

std::int64_t width_of(Place place, const LayerSpec& spec) noexcept {
  const bool is_separate = spec.qkv_layout == QkvLayout::separate;
  switch (place) {
    case Place::residual:
    case Place::attention_in:
    case Place::mlp_in: return spec.hidden_size;
    case Place::qkv: return is_separate ? 0 : spec.qkv_size();
    case Place::queries: return is_separate ? spec.attention_size() : 0;
    case Place::keys:
    case Place::values: return is_separate ? spec.kv_size() : 0;
    case Place::heads: return spec.attention_size();
    case Place::gate: return spec.gated_mlp ? spec.intermediate_size : 0;
    case Place::mlp: return spec.intermediate_size;
  }
  return 0;
}

LayerProgram make_layer_program(const LayerSpec& spec, Part part) {
  LayerProgram program = whole_layer(spec);
  std::erase_if(program, [part](const Step& step) { return !is_in(step, part); });
  return with_dependencies(std::move(program));
}

LayerProgram mlp_first(const LayerProgram& program) {
  const auto rank = [](const Step& step) {
    return step.operation == Operation::norm ? 0 : step.of_mlp ? 1 : 2;
  };
  LayerProgram ordered;
  std::uint32_t done = 0;
  while (ordered.size() < program.size()) {
    std::size_t next = program.size();
    for (std::size_t i = 0; i < program.size(); ++i) {
      const bool is_ready = (done >> i & 1) == 0 && (program[i].after & ~done) == 0;
      if (is_ready && (next == program.size() || rank(program[i]) < rank(program[next]))) next = i;
    }
    done |= 1u << next;
    ordered.push_back(program[next]);
  }
  return with_dependencies(std::move(ordered));
}

std::vector<std::span<const Step>> phases_of(const LayerProgram& program) {
  std::vector<std::span<const Step>> phases;
  for (auto begin = program.begin(); begin != program.end();) {
    const auto joins = [&](const Step& step) {
      return step.operation == begin->operation &&
             std::none_of(begin, program.begin() + (&step - program.data()),
                          [&](const Step& other) { return other.output == step.input; });
    };
    const auto end = std::find_if_not(begin + 1, program.end(), joins);
    phases.emplace_back(begin, end);
    begin = end;
  }
  return phases;
}

}  // namespace clusterfusion::plan
