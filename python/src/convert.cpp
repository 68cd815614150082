#include "convert.hpp"

#include <string>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"

namespace clusterfusion::python {
namespace {

void require_cpu(const ffi::TensorView& tensor, std::string_view name) {
  require(
      tensor.device().device_type == kDLCPU, ErrorKind::wrong_type,
      "{}: expected an array in host memory, found one on DLPack device type {}; copy it to the "
      "CPU first",
      name, static_cast<int>(tensor.device().device_type));
}

std::string shape_text(const ffi::TensorView& tensor) {
  std::string text = "[";
  for (int axis = 0; axis < tensor.ndim(); ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

template <typename T>
T get(const Fields& fields, const char* name) {
  return fields.at(name).cast<T>();
}

std::vector<TokenId> get_tokens(const Fields& fields, const char* name) {
  const auto tensor = get<ffi::Tensor>(fields, name);
  const std::span<const TokenId> tokens = tokens_of(tensor);
  return {tokens.begin(), tokens.end()};
}

template <typename Range>
ffi::Array<ffi::Any> to_array(const Range& range) {
  ffi::Array<ffi::Any> array;
  for (const auto& value : range) array.push_back(value);
  return array;
}

ffi::Array<ffi::Any> token_with_top(TokenId token, float logprob,
                                    const std::vector<TokenLogprob>& top) {
  ffi::Array<ffi::Any> ids;
  ffi::Array<ffi::Any> logprobs;
  for (const TokenLogprob& likely : top) {
    ids.push_back(likely.token);
    logprobs.push_back(likely.logprob);
  }
  return {token, logprob, ids, logprobs};
}

}  // namespace

std::span<const TokenId> tokens_of(const ffi::TensorView& tensor) {
  require_cpu(tensor, "tokens");
  const DLDataType dtype = tensor.dtype();
  require(dtype.code == kDLInt && dtype.bits == 32 && dtype.lanes == 1 && tensor.ndim() == 1 &&
              tensor.IsContiguous(),
          ErrorKind::wrong_type, "tokens: expected a contiguous vector of int32, found shape {}",
          shape_text(tensor));
  return {static_cast<const TokenId*>(tensor.data_ptr()), static_cast<std::size_t>(tensor.size(0))};
}

std::span<float> matrix_of(const ffi::TensorView& tensor, std::int64_t rows, std::int64_t columns,
                           std::string_view name) {
  require_cpu(tensor, name);
  const DLDataType dtype = tensor.dtype();
  require(dtype.code == kDLFloat && dtype.bits == 32 && dtype.lanes == 1, ErrorKind::wrong_type,
          "{}: expected dtype float32, found DLPack type code {} with {} bits", name,
          static_cast<int>(dtype.code), static_cast<int>(dtype.bits));
  require(tensor.ndim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
          ErrorKind::invalid_argument, "{}: expected shape [{}, {}] (tokens, vocabulary), found {}",
          name, rows, columns, shape_text(tensor));
  require(tensor.IsContiguous(), ErrorKind::invalid_argument,
          "{}: expected a contiguous row-major array, found strides; pass a contiguous one", name);
  return {static_cast<float*>(tensor.data_ptr()), static_cast<std::size_t>(rows * columns)};
}

GenerateRequest to_request(const Fields& fields) {
  GenerateRequest request;
  request.prompt = view_of(get<ffi::Bytes>(fields, "prompt"));
  request.prompt_tokens = get_tokens(fields, "prompt_tokens");
  request.add_special_tokens = get<bool>(fields, "add_special_tokens");
  request.max_new_tokens = get<std::int64_t>(fields, "max_new_tokens");
  for (const auto& stop : get<ffi::Array<ffi::Bytes>>(fields, "stop")) {
    request.stop_strings.emplace_back(view_of(stop));
  }
  request.stop_tokens = get_tokens(fields, "stop_tokens");
  request.ignore_eos = get<bool>(fields, "ignore_eos");
  request.skip_special_tokens = get<bool>(fields, "skip_special_tokens");
  request.n = static_cast<std::int32_t>(get<std::int64_t>(fields, "n"));
  request.num_prompt_logprobs =
      static_cast<std::int32_t>(get<std::int64_t>(fields, "num_prompt_logprobs"));

  SamplingParams& sampling = request.sampling;
  sampling.temperature = static_cast<float>(get<double>(fields, "temperature"));
  sampling.top_k = static_cast<std::int32_t>(get<std::int64_t>(fields, "top_k"));
  sampling.top_p = static_cast<float>(get<double>(fields, "top_p"));
  sampling.min_p = static_cast<float>(get<double>(fields, "min_p"));
  sampling.repetition_penalty = static_cast<float>(get<double>(fields, "repetition_penalty"));
  // The seed's 64 bits travel as a signed integer.
  sampling.seed = static_cast<std::uint64_t>(get<std::int64_t>(fields, "seed"));
  sampling.num_logprobs = static_cast<std::int32_t>(get<std::int64_t>(fields, "num_logprobs"));
  request.min_new_tokens = get<std::int64_t>(fields, "min_new_tokens");
  request.allow_padded_ids = get<bool>(fields, "allow_padded_ids");
  sampling.frequency_penalty = static_cast<float>(get<double>(fields, "frequency_penalty"));
  sampling.presence_penalty = static_cast<float>(get<double>(fields, "presence_penalty"));
  sampling.no_repeat_ngram_size =
      static_cast<std::int32_t>(get<std::int64_t>(fields, "no_repeat_ngram_size"));
  const std::vector<TokenId> biased = get_tokens(fields, "biased_tokens");
  const auto biases = get<ffi::Array<double>>(fields, "biases");
  for (std::size_t i = 0; i < biased.size(); ++i) {
    sampling.logit_bias.push_back(
        {biased[i], static_cast<float>(biases[static_cast<std::int64_t>(i)])});
  }
  return request;
}

ffi::Array<ffi::Any> to_ffi(const SampledToken& sampled) {
  return token_with_top(sampled.token, sampled.logprob, sampled.top);
}

ffi::Array<ffi::Any> to_ffi(const ScoredToken& scored) {
  return token_with_top(scored.token, scored.logprob, scored.top);
}

ffi::Array<ffi::Any> to_ffi(const GenerateEvent& event) {
  ffi::Any sampled;
  if (event.token) sampled = to_ffi(*event.token);
  ffi::Any reason;
  if (event.finish_reason) reason = ffi::String(name_of(*event.finish_reason));
  return {static_cast<std::int64_t>(event.index), ffi::String(event.text), sampled, reason};
}

Fields to_ffi(const Statistics& statistics) {
  return {
      {"prompt_tokens", statistics.prompt_tokens},
      {"new_tokens", statistics.new_tokens},
      {"prefill_seconds", statistics.prefill_seconds},
      {"time_to_first_token_seconds", statistics.time_to_first_token_seconds},
      {"decode_seconds", statistics.decode_seconds},
      {"seconds_per_token", statistics.seconds_per_token},
      {"tokens_per_second", statistics.tokens_per_second},
      {"bytes_per_second", statistics.bytes_per_second},
      {"read_ceiling_bytes_per_second", statistics.read_ceiling_bytes_per_second},
      {"ceiling_share", statistics.ceiling_share},
      {"queue_seconds", statistics.queue_seconds},
      {"preemptions", statistics.preemptions},
      {"recompute_seconds", statistics.recompute_seconds},
      {"prefix_hit_tokens", statistics.prefix_hit_tokens},
      {"decode_steps", statistics.decode_steps},
      {"draft_steps", statistics.draft_steps},
      {"draft_proposed", statistics.draft_proposed},
      {"draft_accepted", statistics.draft_accepted},
      {"mean_accepted", statistics.mean_accepted},
  };
}

Fields to_ffi(const GenerateResult& result) {
  ffi::Array<ffi::Any> sampled;
  for (const SampledToken& token : result.sampled) sampled.push_back(to_ffi(token));
  ffi::Array<ffi::Any> prompt_scores;
  for (const ScoredToken& token : result.prompt_scores) prompt_scores.push_back(to_ffi(token));
  ffi::Any reason;
  if (result.finish_reason) reason = ffi::String(name_of(*result.finish_reason));
  return {
      {"text", ffi::String(result.text)},        {"prompt_tokens", to_tensor(result.prompt_tokens)},
      {"tokens", to_tensor(result.tokens)},      {"sampled", sampled},
      {"prompt_scores", prompt_scores},          {"finish_reason", reason},
      {"statistics", to_ffi(result.statistics)},
  };
}

Fields to_ffi(const ModelConfig& config) {
  ffi::Any bos_token;
  if (config.bos_token) bos_token = *config.bos_token;
  return {
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"num_layers", config.num_layers},
      {"num_heads", config.num_heads},
      {"num_kv_heads", config.kv_heads()},
      {"head_dim", config.head_dim},
      {"intermediate_size", config.intermediate_size},
      {"max_positions", config.max_positions},
      {"rotary_dim", config.rotary_dim},
      {"rope_theta", config.rope_theta},
      {"layer_norm_eps", config.layer_norm_eps},
      {"hidden_act", ffi::String(config.hidden_act)},
      {"parallel_residual", config.parallel_residual},
      {"attention_bias", config.attention_bias},
      {"tied_embeddings", config.tied_embeddings},
      {"dtype", ffi::String(name_of(config.dtype))},
      {"bos_token", bos_token},
      {"eos_tokens", to_array(config.eos_tokens)},
      {"model_type", ffi::String(config.model_type)},
      {"rope_type", ffi::String(name_of(config.rope_scaling.kind))},
      {"sliding_window", config.sliding_window},
  };
}

Fields to_ffi(const PerplexityResult& result) {
  return {
      {"perplexity", result.perplexity},       {"mean_nll", result.mean_nll},
      {"bits_per_byte", result.bits_per_byte}, {"scored_tokens", result.scored_tokens},
      {"total_tokens", result.total_tokens},   {"seconds", result.seconds},
  };
}

Fields to_ffi(ScoreResult result) {
  return {
      {"tokens", to_tensor(std::move(result.tokens))},
      {"logprobs", to_tensor(std::move(result.logprobs))},
      {"total", result.total},
  };
}

// Arrays over all tokens, not an object for each.
Fields to_ffi(const LoglikelihoodResult& result) {
  std::vector<TokenId> tokens, top_tokens;
  std::vector<float> logprobs, top_logprobs;
  for (const ScoredToken& scored : result.tokens) {
    tokens.push_back(scored.token);
    logprobs.push_back(scored.logprob);
    for (const TokenLogprob& likely : scored.top) {
      top_tokens.push_back(likely.token);
      top_logprobs.push_back(likely.logprob);
    }
  }
  return {
      {"tokens", to_tensor(std::move(tokens))},
      {"logprobs", to_tensor(std::move(logprobs))},
      {"total", result.total},
      {"is_greedy", result.is_greedy},
      {"top_tokens", to_tensor(std::move(top_tokens))},
      {"top_logprobs", to_tensor(std::move(top_logprobs))},
  };
}

std::vector<std::vector<TokenId>> to_token_lists(const ffi::Array<ffi::Tensor>& lists) {
  std::vector<std::vector<TokenId>> result;
  for (const ffi::Tensor& list : lists) {
    const std::span<const TokenId> tokens = tokens_of(list);
    result.emplace_back(tokens.begin(), tokens.end());
  }
  return result;
}

}  // namespace clusterfusion::python
