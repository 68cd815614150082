#include "ops/gpu_task.hpp"

#include "base/fail.hpp"

namespace clusterfusion::ops {
namespace {

void refuse_if(bool is_unknown, const char* option, const char* expected) {
  require(!is_unknown, ErrorKind::unsupported,
          "{}: expected {}, because the kernels of GPUs know nothing else yet; move the tensors to "
          "the CPU, which computes it",
          option, expected);
}

void require_known(const LayerWork& work) {
  const LayerSpec& spec = work.spec;
  const auto is_absent = [&](LayerTensor tensor) { return work.weight(tensor) == nullptr; };
  refuse_if(work.block_table != nullptr, "block_table", "None");
  refuse_if(spec.attention_size() != spec.hidden_size, "head_dim", "hidden / num_heads");
  refuse_if(spec.kv_heads() != spec.num_heads, "num_kv_heads", "as many as num_heads");
  refuse_if(spec.qkv_layout != QkvLayout::by_kv_head, "qkv_weight_interleaved", "True");
  refuse_if(spec.qk_norm, "q_norm_weight", "None");
  refuse_if(spec.norm != NormKind::layer_norm, "norm", "\"layer\"");
  refuse_if(spec.gated_mlp, "gated", "False");
  refuse_if(!spec.parallel_residual, "parallel_residual", "True");
  refuse_if(is_absent(LayerTensor::mlp_up_bias), "mlp_up_bias", "a tensor");
}

}  // namespace

LayerTask gpu_task(const LayerWork& work) {
  if (work.part != plan::Part::mlp_down) require_known(work);
  refuse_if(work.rows != 1, "hidden_states", "one row");
  refuse_if(work.part != plan::Part::attention_and_mlp_up &&
                work.weight(LayerTensor::mlp_down_bias) == nullptr,
            "mlp_down_bias", "a tensor");
  const LayerSpec& spec = work.spec;
  LayerTask task;
  task.part = work.part;
  task.shape = {work.dtype,    spec.hidden_size, spec.intermediate_size, spec.num_heads,
                spec.head_dim, spec.rotary_dim,  work.cache.page_size};
  task.activation = spec.activation;
  task.layer_norm_eps = static_cast<float>(spec.layer_norm_eps);
  task.split = work.split;
  task.weights = work.weights;
  task.input = work.input;
  task.k_cache = work.k_cache;
  task.v_cache = work.v_cache;
  task.cos = work.cos;
  task.sin = work.sin;
  task.position = work.position;
  task.device_position = work.positions;
  task.k_new = work.k_new;
  task.v_new = work.v_new;
  task.attn_output = work.attn_output;
  task.mlp_intermediate = work.mlp_intermediate;
  task.output = work.output;
  return task;
}

}  // namespace clusterfusion::ops
