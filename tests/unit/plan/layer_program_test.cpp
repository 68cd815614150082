// The program of a layer: every dependency of the layer's formula is kept, in each order and part
// in which it is walked.
#include "plan/layer_program.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {
namespace {

using enum LayerTensor;
using testing::ElementsAre;

std::vector<LayerSpec> all_specs() {
  std::vector<LayerSpec> specs;
  for (int bits = 0; bits < 16; ++bits) {
    LayerSpec spec;
    spec.hidden_size = 96;
    spec.num_heads = 6;
    spec.head_dim = 16;
    spec.intermediate_size = 200;
    spec.parallel_residual = (bits & 1) != 0;
    spec.gated_mlp = (bits & 2) != 0;
    spec.num_kv_heads = (bits & 4) != 0 ? 2 : 6;
    spec.qkv_layout = (bits & 8) != 0 ? QkvLayout::separate : QkvLayout::by_kv_head;
    specs.push_back(spec);
  }
  return specs;
}

// Attention has none of its own: the weights' order tells the order of the steps.
std::vector<LayerTensor> weights_of(std::span<const Step> steps) {
  std::vector<LayerTensor> weights;
  for (const Step& step : steps) {
    if (step.operation != Operation::attention) weights.push_back(step.weight);
  }
  return weights;
}

std::size_t find(const LayerProgram& program, LayerTensor weight) {
  const auto found = std::ranges::find_if(program, [&](const Step& step) {
    return step.operation != Operation::attention && step.weight == weight;
  });
  return static_cast<std::size_t>(found - program.begin());
}
std::size_t find_attention(const LayerProgram& program) {
  const auto found = std::ranges::find(program, Operation::attention, &Step::operation);
  return static_cast<std::size_t>(found - program.begin());
}

bool is_separate(const LayerSpec& spec) { return spec.qkv_layout == QkvLayout::separate; }

// What attention's input comes from.
std::vector<LayerTensor> projections_of(const LayerSpec& spec) {
  if (is_separate(spec)) return {query_weight, key_weight, value_weight};
  return {qkv_weight};
}

// Every wait is for an earlier step, and what the formula of a layer says must come first does.
void expect_order(const LayerProgram& program, const LayerSpec& spec) {
  const auto expect_waits = [&](std::size_t step, std::size_t before) {
    ASSERT_LT(step, program.size());
    EXPECT_TRUE(program[step].waits_for(before)) << step << " for " << before;
  };
  for (std::size_t i = 0; i < program.size(); ++i) EXPECT_EQ(program[i].after >> i, 0u);
  for (const LayerTensor projection : projections_of(spec)) {
    expect_waits(find(program, projection), find(program, input_norm_weight));
    expect_waits(find_attention(program), find(program, projection));
    for (const LayerTensor other : projections_of(spec))
      EXPECT_FALSE(program[find(program, projection)].waits_for(find(program, other)));
  }
  expect_waits(find(program, attention_out_weight), find_attention(program));
  expect_waits(find(program, mlp_up_weight), find(program, post_norm_weight));
  expect_waits(find(program, mlp_down_weight), find(program, mlp_up_weight));
  if (spec.gated_mlp) {
    expect_waits(find(program, mlp_gate_weight), find(program, post_norm_weight));
    expect_waits(find(program, mlp_up_weight), find(program, mlp_gate_weight));
  }
  if (spec.parallel_residual) {
    // Both norms see the layer's input, and the sums have one order.
    expect_waits(find(program, mlp_down_weight), find(program, input_norm_weight));
    expect_waits(find(program, mlp_down_weight), find(program, post_norm_weight));
    expect_waits(find(program, attention_out_weight), find(program, mlp_down_weight));
    EXPECT_FALSE(program[find_attention(program)].waits_for(find(program, mlp_up_weight)));
  } else {
    expect_waits(find(program, post_norm_weight), find(program, attention_out_weight));
  }
}

TEST(LayerProgram, KeepsEveryDependency) {
  for (const LayerSpec& spec : all_specs()) {
    const LayerProgram program = make_layer_program(spec);
    EXPECT_EQ(program.size(), (spec.gated_mlp ? 8u : 7u) + (is_separate(spec) ? 2u : 0u));
    expect_order(program, spec);
    expect_order(mlp_first(program), spec);
  }
}

TEST(LayerProgram, HasTheMlpFirstWhereItMayBe) {
  LayerSpec spec;
  EXPECT_THAT(weights_of(mlp_first(make_layer_program(spec))),
              ElementsAre(input_norm_weight, post_norm_weight, mlp_up_weight, mlp_down_weight,
                          qkv_weight, attention_out_weight));
  spec.parallel_residual = false;
  EXPECT_THAT(weights_of(mlp_first(make_layer_program(spec))),
              ElementsAre(input_norm_weight, qkv_weight, attention_out_weight, post_norm_weight,
                          mlp_up_weight, mlp_down_weight));
}

// A part has the whole's steps in the whole's order, and the waits among them.
TEST(LayerProgram, PartsAreOfTheWhole) {
  for (const LayerSpec& spec : all_specs()) {
    const LayerProgram whole = make_layer_program(spec);
    for (const Part part :
         {Part::attention_and_mlp_up, Part::mlp_down, Part::attention, Part::mlp}) {
      const LayerProgram steps = make_layer_program(spec, part);
      std::vector<std::size_t> at;  // of each step, in the whole
      for (const Step& step : steps) {
        at.push_back(step.operation == Operation::attention ? find_attention(whole)
                                                            : find(whole, step.weight));
      }
      EXPECT_TRUE(std::ranges::is_sorted(at));
      for (std::size_t j = 0; j < steps.size(); ++j) {
        for (std::size_t i = 0; i < steps.size(); ++i) {
          EXPECT_EQ(steps[j].waits_for(i), whole[at[j]].waits_for(at[i]));
        }
      }
    }
    const auto size = [&](Part part) { return make_layer_program(spec, part).size(); };
    EXPECT_EQ(size(Part::attention) + size(Part::mlp), whole.size());
    EXPECT_EQ(size(Part::attention_and_mlp_up) + size(Part::mlp_down), whole.size());
    EXPECT_EQ(size(Part::attention), is_separate(spec) ? 6u : 4u);
    EXPECT_EQ(size(Part::mlp_down), 1u);
  }
}

// Phases cover the program in order; no step of one multiplies what another of it gives.
TEST(LayerProgram, PhasesCanBeSharedOut) {
  for (const LayerSpec& spec : all_specs()) {
    const LayerProgram program = make_layer_program(spec);
    const Step* next = program.data();
    for (const std::span<const Step> phase : phases_of(program)) {
      EXPECT_EQ(phase.data(), next);
      next += phase.size();
      std::set<Place> outputs;
      for (const Step& step : phase) {
        EXPECT_EQ(step.operation, phase[0].operation);
        EXPECT_FALSE(outputs.contains(step.input));
        outputs.insert(step.output);
      }
    }
    EXPECT_EQ(next, program.data() + program.size());
  }
}

LayerTensor weight_of(Stream stream) {
  switch (stream) {
    case Stream::qkv: return qkv_weight;
    case Stream::mlp_up: return mlp_up_weight;
    case Stream::mlp_down: return mlp_down_weight;
    default: return attention_out_weight;
  }
}

// The streaming kernels schedule the program's products, phase by phase, in the program's order.
TEST(LayerProgram, IsWhatTheStreamingKernelsWalk) {
  for (const bool parallel : {false, true}) {
    LayerSpec spec;
    spec.parallel_residual = parallel;
    const LayerProgram program = make_layer_program(spec);
    std::int32_t index = 0;
    bool attention_before = false;
    for (const std::span<const Step> phase : phases_of(program)) {
      if (phase[0].operation == Operation::attention) attention_before = true;
      if (phase[0].operation != Operation::product) continue;
      ASSERT_LT(index, layer_phases(parallel));
      const Phase streamed = layer_phase(parallel, index++);
      std::vector<LayerTensor> weights{weight_of(streamed.first)};
      if (streamed.second != Stream::none) weights.push_back(weight_of(streamed.second));
      EXPECT_EQ(weights, weights_of(phase));
      EXPECT_EQ(streamed.attention_before, attention_before);
      attention_before = false;
    }
    EXPECT_EQ(index, layer_phases(parallel));
  }
}

TEST(LayerProgram, PlacesAreAsWideAsTheirMatrices) {
  for (const LayerSpec& spec : all_specs()) {
    EXPECT_EQ(width_of(Place::residual, spec), 96);
    EXPECT_EQ(width_of(Place::heads, spec), 96);
    const std::int64_t kv = spec.num_kv_heads == 2 ? 32 : 96;
    EXPECT_EQ(width_of(Place::qkv, spec), is_separate(spec) ? 0 : 96 + 2 * kv);
    EXPECT_EQ(width_of(Place::queries, spec), is_separate(spec) ? 96 : 0);
    EXPECT_EQ(width_of(Place::keys, spec), is_separate(spec) ? kv : 0);
    EXPECT_EQ(width_of(Place::values, spec), is_separate(spec) ? kv : 0);
    EXPECT_EQ(width_of(Place::mlp, spec), 200);
    EXPECT_EQ(width_of(Place::gate, spec), spec.gated_mlp ? 200 : 0);
  }
}

}  // namespace
}  // namespace clusterfusion::plan
