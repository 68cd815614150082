// What the kernels of GPUs are told of a layer, and what is refused because they do not know it.
#include "ops/gpu_task.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "clusterfusion/error.hpp"

namespace clusterfusion::test {
namespace {

// GPT-NeoX's layer for one token. Nothing is behind its pointers.
LayerWork usual_work() {
  static std::byte memory[kNumLayerTensors + 8];
  static float tables[2];
  LayerWork work;
  work.spec.hidden_size = 32;
  work.spec.num_heads = work.spec.num_kv_heads = 4;
  work.spec.head_dim = 8;
  work.spec.rotary_dim = 4;
  work.spec.intermediate_size = 48;
  for (std::size_t i = 0; i < kNumLayerTensors; ++i) work.weights[i] = &memory[i];
  work.cache.page_size = 100;
  work.position = 7;
  work.k_cache = &memory[kNumLayerTensors];
  work.v_cache = &memory[kNumLayerTensors + 1];
  work.output = &memory[kNumLayerTensors + 2];
  work.cos = &tables[0];
  work.sin = &tables[1];
  return work;
}

TEST(GpuTask, IsTheUsualLayer) {
  const LayerWork work = usual_work();
  const LayerTask task = ops::gpu_task(work);
  EXPECT_EQ(task.part, plan::Part::whole);
  EXPECT_EQ(task.shape.hidden_size, 32);
  EXPECT_EQ(task.shape.intermediate_size, 48);
  EXPECT_EQ(task.shape.num_heads, 4);
  EXPECT_EQ(task.shape.head_dim, 8);
  EXPECT_EQ(task.shape.rotary_dim, 4);
  EXPECT_EQ(task.shape.max_positions, 100);
  EXPECT_EQ(task.position, 7);
  EXPECT_EQ(task.device_position, nullptr);
  EXPECT_EQ(task.weights, work.weights);
  EXPECT_EQ(task.k_cache, work.k_cache);
  EXPECT_EQ(task.v_cache, work.v_cache);
  EXPECT_EQ(task.output, work.output);
  EXPECT_EQ(task.cos, work.cos);
  EXPECT_EQ(task.sin, work.sin);
}

TEST(GpuTask, NamesEachOptionThatIsUnknown) {
  static const std::int32_t table[1] = {};
  const std::pair<const char*, std::function<void(LayerWork&)>> options[] = {
      {"block_table", [](LayerWork& work) { work.block_table = table; }},
      {"head_dim", [](LayerWork& work) { work.spec.head_dim = 16; }},
      {"num_kv_heads", [](LayerWork& work) { work.spec.num_kv_heads = 2; }},
      {"qkv_weight_interleaved",
       [](LayerWork& work) { work.spec.qkv_layout = QkvLayout::separate; }},
      {"q_norm_weight", [](LayerWork& work) { work.spec.qk_norm = true; }},
      {"norm", [](LayerWork& work) { work.spec.norm = NormKind::rms_norm; }},
      {"gated", [](LayerWork& work) { work.spec.gated_mlp = true; }},
      {"parallel_residual", [](LayerWork& work) { work.spec.parallel_residual = false; }},
      {"mlp_up_bias",
       [](LayerWork& work) { work.weights[index_of(LayerTensor::mlp_up_bias)] = nullptr; }},
      {"mlp_down_bias",
       [](LayerWork& work) { work.weights[index_of(LayerTensor::mlp_down_bias)] = nullptr; }},
      {"hidden_states",
       [](LayerWork& work) {
         work.part = plan::Part::mlp_down;
         work.rows = 2;
       }},
  };
  for (const auto& [name, choose] : options) {
    LayerWork work = usual_work();
    choose(work);
    try {
      ops::gpu_task(work);
      ADD_FAILURE() << name << ": no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      EXPECT_THAT(error.what(), ::testing::StartsWith(std::string(name) + ": expected "));
    }
  }
}

TEST(GpuTask, NeedsNoBiasOfTheOtherHalf) {
  LayerWork first = usual_work(), second = usual_work();
  first.part = plan::Part::attention_and_mlp_up;
  first.weights[index_of(LayerTensor::mlp_down_bias)] = nullptr;
  second.part = plan::Part::mlp_down;
  second.weights[index_of(LayerTensor::mlp_up_bias)] = nullptr;
  EXPECT_EQ(ops::gpu_task(first).part, first.part);
  EXPECT_EQ(ops::gpu_task(second).part, second.part);
}

}  // namespace
}  // namespace clusterfusion::test
