#include "clusterfusion/engine.hpp"

#include <tvm/ffi/extra/c_env_api.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/fail.hpp"
#include "convert.hpp"
#include "export.hpp"
#include "objects.hpp"

namespace clusterfusion::python {
namespace {

std::optional<DType> to_kv_dtype(const std::string& name) {
  if (name.empty()) return std::nullopt;
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    if (name == name_of(dtype)) return dtype;
  }
  fail(ErrorKind::invalid_argument,
       "kv_dtype: expected 'float16', 'bfloat16', 'float32' or None, found '{}'", name);
}

DecodeMode to_mode(const std::string& name) {
  const std::optional<DecodeMode> mode = decode_mode_of(name);
  require(mode.has_value(), ErrorKind::invalid_argument,
          "mode: expected 'latency' or 'throughput', found '{}'", name);
  return *mode;
}

// The options in the order in which Python passes them.
EngineOptions to_options(const std::string& device, std::int64_t threads, std::int64_t context,
                         const std::string& kv_dtype, const std::string& mode,
                         std::int64_t max_sequences, std::int64_t kv_bytes, bool prefix_cache,
                         const std::string& draft, std::int64_t draft_tokens,
                         const ffi::Optional<ffi::Function>& progress) {
  EngineOptions options;
  options.device = device;
  options.threads = static_cast<int>(threads);
  options.max_positions = context;
  options.kv_dtype = to_kv_dtype(kv_dtype);
  options.mode = to_mode(mode);
  options.max_sequences = max_sequences;
  options.kv_bytes = kv_bytes;
  options.prefix_cache = prefix_cache;
  options.draft = draft;
  options.draft_tokens = static_cast<std::int32_t>(draft_tokens);
  if (progress) {
    options.load_progress = [report = *progress](std::int64_t done, std::int64_t total) {
      report(done, total);
    };
  }
  // Python's signal handlers (Ctrl-C) run while a call computes, in the main thread; what they
  // raise waits there until the call has ended.
  options.interrupted = [] { return calls_are_ending || TVMFFIEnvCheckSignals() != 0; };
  return options;
}

EngineRef engine_open(ffi::String path, ffi::String device, std::int64_t threads,
                      std::int64_t context, ffi::String kv_dtype, ffi::String mode,
                      std::int64_t max_sequences, std::int64_t kv_bytes, bool prefix_cache,
                      ffi::String draft, std::int64_t draft_tokens,
                      ffi::Optional<ffi::Function> progress) {
  const EngineOptions options = to_options(device, threads, context, kv_dtype, mode, max_sequences,
                                           kv_bytes, prefix_cache, draft, draft_tokens, progress);
  return EngineRef(ffi::make_object<EngineObj>(Engine::open(std::string(path), options)));
}

// Of a model in memory, whose texts are (name, config.json, generation_config.json or "").
EngineRef engine_from_tensors(ffi::Array<ffi::String> texts, ffi::Array<ffi::String> names,
                              ffi::Array<ffi::Tensor> tensors,
                              ffi::Optional<TokenizerRef> tokenizer, ffi::String device,
                              std::int64_t threads, std::int64_t context, ffi::String kv_dtype,
                              ffi::String mode, std::int64_t max_sequences, std::int64_t kv_bytes,
                              bool prefix_cache, ffi::String draft, std::int64_t draft_tokens,
                              ffi::Optional<ffi::Function> progress) {
  ModelInMemory given;
  given.name = texts[0];
  given.config = texts[1];
  given.generation_config = texts[2];
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(names.size()); ++i) {
    given.tensors.push_back({names[i], *tensors[i].GetDLTensorPtr()});
  }
  given.owner = std::make_shared<const ffi::Array<ffi::Tensor>>(tensors);
  const EngineOptions options = to_options(device, threads, context, kv_dtype, mode, max_sequences,
                                           kv_bytes, prefix_cache, draft, draft_tokens, progress);
  return EngineRef(ffi::make_object<EngineObj>(
      Engine::open(Model::from_memory(std::move(given)),
                   tokenizer ? (*tokenizer)->tokenizer : nullptr, options)));
}

Fields engine_config(EngineRef engine) { return to_ffi(engine->engine->model().config()); }

Fields engine_info(EngineRef engine) {
  const EngineInfo info = engine->engine->info();
  const Model& model = engine->engine->model();
  return {
      {"path", ffi::String(model.folder().string())},
      {"device", ffi::String(info.device)},
      {"device_description", ffi::String(info.device_description)},
      {"device_reason", ffi::String(info.device_reason)},
      {"kv_dtype", ffi::String(name_of(info.kv_dtype))},
      {"kv_bytes_per_position", info.kv_bytes_per_position},
      {"max_positions", info.max_positions},
      {"kv_bytes", info.kv_bytes},
      {"draft", ffi::String(info.draft)},
      {"num_parameters", model.num_parameters()},
      {"total_bytes", model.total_bytes()},
      {"bytes_per_token", model.bytes_per_token()},
      {"has_tokenizer", engine->engine->has_tokenizer()},
  };
}

Fields engine_serving_statistics(EngineRef engine) {
  const ServingStatistics statistics = engine->engine->serving_statistics();
  return {
      {"sequences_active", statistics.sequences_active},
      {"sequences_waiting", statistics.sequences_waiting},
      {"kv_pages", statistics.kv_pages},
      {"kv_pages_in_use", statistics.kv_pages_in_use},
      {"kv_pages_cached", statistics.kv_pages_cached},
      {"prompt_tokens", statistics.prompt_tokens},
      {"prefix_hit_tokens", statistics.prefix_hit_tokens},
      {"preemptions", statistics.preemptions},
  };
}

std::int64_t engine_save_prompt_cache(EngineRef engine, ffi::TensorView prompt, ffi::String file) {
  return engine->engine->save_prompt_cache(tokens_of(prompt), std::string(file));
}

// Without tokens: for any prompt.
std::int64_t engine_load_prompt_cache(EngineRef engine, ffi::String file, ffi::TensorView prompt) {
  return engine->engine->load_prompt_cache(std::string(file), tokens_of(prompt));
}

ffi::Array<ffi::String> engine_warnings(EngineRef engine) {
  ffi::Array<ffi::String> warnings;
  for (const std::string& warning : engine->engine->warnings()) warnings.push_back(warning);
  return warnings;
}

// What generation_config.json sets, as options of generate().
Fields engine_generation_config(EngineRef engine) {
  GenerateRequest request;
  apply_generation_config(engine->engine->model().generation_config(), request);
  const SamplingParams& sampling = request.sampling;
  return {
      {"max_new_tokens", request.max_new_tokens},
      {"temperature", sampling.temperature},
      {"top_k", sampling.top_k},
      {"top_p", sampling.top_p},
      {"min_p", sampling.min_p},
      {"repetition_penalty", sampling.repetition_penalty},
  };
}

TokenizerRef engine_tokenizer(EngineRef engine) {
  // The engine owns its tokenizer; the handle keeps the engine alive.
  const std::shared_ptr<const Tokenizer> tokenizer(&engine->engine->tokenizer(),
                                                   [engine](const Tokenizer*) {});
  return TokenizerRef(ffi::make_object<TokenizerObj>(tokenizer));
}

GenerationRef engine_start(EngineRef engine, ffi::Array<Fields> requests) {
  std::vector<GenerateRequest> converted;
  for (const Fields& request : requests) converted.push_back(to_request(request));
  auto generation = engine->engine->start(std::move(converted));
  return GenerationRef(ffi::make_object<GenerationObj>(engine, std::move(generation)));
}

ffi::Any generation_next(GenerationRef generation) {
  const std::lock_guard lock(generation->mutex);
  const auto event = generation->generation->next();
  return event ? ffi::Any(to_ffi(*event)) : ffi::Any();
}

void generation_cancel(GenerationRef generation) { generation->generation->cancel(); }

ffi::Array<Fields> generation_results(GenerationRef generation) {
  const std::lock_guard lock(generation->mutex);
  ffi::Array<Fields> results;
  for (const GenerateResult& result : generation->generation->results()) {
    results.push_back(to_ffi(result));
  }
  return results;
}

void engine_logits(EngineRef engine, ffi::TensorView tokens, ffi::TensorView out) {
  const std::span<const TokenId> ids = tokens_of(tokens);
  engine->engine->logits(ids, matrix_of(out, static_cast<std::int64_t>(ids.size()),
                                        engine->engine->model().config().vocab_size, "out"));
}

Fields engine_score(EngineRef engine, ffi::TensorView tokens) {
  return to_ffi(engine->engine->score(tokens_of(tokens)));
}

ffi::Array<Fields> engine_score_all(EngineRef engine, ffi::Array<ffi::Tensor> texts) {
  ffi::Array<Fields> results;
  for (ScoreResult& result : engine->engine->score(to_token_lists(texts))) {
    results.push_back(to_ffi(std::move(result)));
  }
  return results;
}

// (tokens of the context, tokens of the continuation)
ffi::Array<ffi::Tensor> engine_encode_pair(EngineRef engine, ffi::Bytes context,
                                           ffi::Bytes continuation) {
  LoglikelihoodRequest pair = engine->engine->encode_pair(view_of(context), view_of(continuation));
  return {to_tensor(std::move(pair.context)), to_tensor(std::move(pair.continuation))};
}

ffi::Array<Fields> engine_loglikelihood(EngineRef engine, ffi::Array<ffi::Tensor> contexts,
                                        ffi::Array<ffi::Tensor> continuations, std::int64_t num_top,
                                        ffi::Optional<ffi::Function> progress) {
  std::vector<LoglikelihoodRequest> requests;
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    const std::span<const TokenId> context = tokens_of(contexts[i]);
    const std::span<const TokenId> continuation = tokens_of(continuations[i]);
    requests.push_back(
        {{context.begin(), context.end()}, {continuation.begin(), continuation.end()}});
  }
  LoglikelihoodOptions options;
  options.num_top = static_cast<std::int32_t>(num_top);
  if (progress) {
    options.progress = [report = *progress](std::int64_t done, std::int64_t total) {
      report(done, total);
      return true;
    };
  }
  ffi::Array<Fields> results;
  for (const LoglikelihoodResult& result : engine->engine->loglikelihood(requests, options)) {
    results.push_back(to_ffi(result));
  }
  return results;
}

PerplexityOptions to_perplexity_options(std::int64_t context, std::int64_t stride,
                                        const std::string& method) {
  require(method == "each_token" || method == "transformers_docs", ErrorKind::invalid_argument,
          "method: expected 'each_token' or 'transformers_docs', found '{}'", method);
  return {.context = context,
          .stride = stride,
          .method = method == "each_token" ? PerplexityMethod::each_token
                                           : PerplexityMethod::transformers_docs,
          .progress = {}};
}

Fields engine_perplexity(EngineRef engine, ffi::TensorView tokens, std::int64_t context,
                         std::int64_t stride, ffi::String method) {
  return to_ffi(engine->engine->perplexity(tokens_of(tokens), 0,
                                           to_perplexity_options(context, stride, method)));
}

Fields engine_perplexity_of_text(EngineRef engine, ffi::Bytes text, std::int64_t context,
                                 std::int64_t stride, ffi::String method) {
  return to_ffi(engine->engine->perplexity(view_of(text), true,
                                           to_perplexity_options(context, stride, method)));
}

double engine_measure_read_ceiling(EngineRef engine) {
  return engine->engine->measure_read_ceiling();
}

void set_calls_ending(bool are_ending) { calls_are_ending = are_ending; }

ffi::String version() { return CLUSTERFUSION_VERSION; }

CLUSTERFUSION_EXPORT(engine_open)
CLUSTERFUSION_EXPORT(engine_from_tensors)
CLUSTERFUSION_EXPORT(engine_config)
CLUSTERFUSION_EXPORT(engine_info)
CLUSTERFUSION_EXPORT(engine_generation_config)
CLUSTERFUSION_EXPORT(engine_tokenizer)
CLUSTERFUSION_EXPORT(engine_warnings)
CLUSTERFUSION_EXPORT(engine_serving_statistics)
CLUSTERFUSION_EXPORT(engine_save_prompt_cache)
CLUSTERFUSION_EXPORT(engine_load_prompt_cache)
CLUSTERFUSION_EXPORT(engine_start)
CLUSTERFUSION_EXPORT(generation_next)
CLUSTERFUSION_EXPORT(generation_cancel)
CLUSTERFUSION_EXPORT(generation_results)
CLUSTERFUSION_EXPORT(engine_logits)
CLUSTERFUSION_EXPORT(engine_score)
CLUSTERFUSION_EXPORT(engine_score_all)
CLUSTERFUSION_EXPORT(engine_encode_pair)
CLUSTERFUSION_EXPORT(engine_loglikelihood)
CLUSTERFUSION_EXPORT(engine_perplexity)
CLUSTERFUSION_EXPORT(engine_perplexity_of_text)
CLUSTERFUSION_EXPORT(engine_measure_read_ceiling)
CLUSTERFUSION_EXPORT(set_calls_ending)
CLUSTERFUSION_EXPORT(version)

}  // namespace
}  // namespace clusterfusion::python
