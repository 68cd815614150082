// Text in, tokens out: a model, its tokenizer and a device behind one door.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/decode_mode.hpp"
#include "clusterfusion/hidden_states.hpp"
#include "clusterfusion/interventions.hpp"
#include "clusterfusion/model.hpp"
#include "clusterfusion/sampling.hpp"
#include "clusterfusion/timeline.hpp"
#include "clusterfusion/tokenizer.hpp"

namespace clusterfusion {

struct EngineOptions {
  std::string device = "auto";     // "auto", "cpu" or "cuda"
  int threads = 0;                 // CPU worker threads; 0: one for each usable core
  std::int64_t max_positions = 0;  // the longest context; 0: the model's own
  // Of the KV cache; nothing: float32 on the CPU, the weights' type on a GPU, which has float32
  // beside it.
  std::optional<DType> kv_dtype;
  DecodeMode mode = DecodeMode::latency;  // of a GPU: what it is to be quick at
  // Sequences that are computed together at most; others wait for their turn.
  std::int64_t max_sequences = 256;
  // Memory that keys and values of sequences and of cached prefixes should take at most. Where it
  // runs out the youngest sequence waits, and is computed again later with the same text. 0: on the
  // CPU half of the memory that is left, on a GPU nine tenths.
  std::int64_t kv_bytes = 0;
  // Whether prompts that begin with the same tokens share the keys and values of these. Texts are
  // the same with and without.
  bool prefix_cache = true;
  // Who proposes tokens that may come next, several of which are then computed in one step; the
  // texts are the same as without. "" or "none": nobody. "ngram": what followed the last tokens of
  // a text where they stood in it before. Else a checkpoint with the same tokens, by its folder or
  // its name on the hub, which runs on the same device.
  std::string draft = {};
  // Tokens that it may propose for a text in one step, 1 to 15. It proposes fewer, or none, where
  // they would not pay.
  std::int32_t draft_tokens = 8;
  // Called by open() while it copies weights to a GPU, on the calling thread, with bytes done and
  // in all: first with 0, last with all. Where weights are used in place it is called once, with
  // all. What it throws ends the loading and comes out of open().
  std::function<void(std::int64_t done, std::int64_t total)> load_progress = {};
  // Asked every few hundredths of a second while a call of the engine computes, on the thread of
  // that call, so perhaps on several at once: true ends the call with an Error of kind
  // `interrupted`. For signals: Ctrl-C.
  std::function<bool()> interrupted = {};
  // Of a name on the hub: a branch, a tag or a whole commit hash; empty: "main".
  std::string revision = {};
};

enum class FinishReason {
  stop_token,     // an end-of-text token or one of `stop_tokens`
  stop_string,    // one of `stop_strings`
  token_limit,    // `max_new_tokens`
  context_limit,  // the model's or the engine's longest context
  cancelled,      // by the caller
};
const char* name_of(FinishReason reason) noexcept;  // "stop_token", ...

struct GenerateRequest {
  // The prompt: text, or token ids if `prompt_tokens` is not empty.
  std::string prompt;
  std::vector<TokenId> prompt_tokens;
  bool add_special_tokens = true;     // when encoding `prompt`
  std::int64_t max_new_tokens = 128;  // >= 0
  std::int64_t min_new_tokens = 0;  // until there are so many, no token that would end the text is
                                    // drawn, as transformers defines it; stop strings still end it
  SamplingParams sampling;
  bool allow_padded_ids = false;  // ids behind the tokenizer's vocabulary may be drawn
  // The text ends before the first of them, also where special tokens that the text leaves out are
  // part of it; none empty.
  std::vector<std::string> stop_strings;
  std::vector<TokenId> stop_tokens;  // besides the model's end-of-text tokens
  bool ignore_eos = false;           // do not stop at the model's end-of-text tokens
  bool skip_special_tokens = true;   // leave special tokens out of the text
  // Samples of the prompt, in [1, 65536]: each has a result of its own, in order, and they share
  // the work on the prompt. Sample i is the text that a request with seed `sampling.seed` + i has
  // (modulo 2^64, as vLLM does it); without a temperature all are the same.
  std::int32_t n = 1;
  // -1: nothing about the prompt's tokens; 0: their log-probabilities; n in 1..100: also the n most
  // likely tokens at each place.
  std::int32_t num_prompt_logprobs = -1;
};

// A token that stands in a text, with what the model says of its place.
struct ScoredToken {
  TokenId token = -1;
  float logprob = 0.0f;           // natural log, after the tokens before it
  bool is_likeliest = false;      // no token has a larger logit, nor a lower id and the same one
  std::vector<TokenLogprob> top;  // the most likely tokens, most likely first, ties by id
};

// Sets what a checkpoint's generation_config.json says (Model::generation_config()), as
// transformers' generate() understands it: greedy without do_sample; with it a temperature of 1,
// top_k 50 and top_p 1 where the file is silent. What it does not speak of is left alone; a request
// takes nothing from that file by itself, but for the end-of-text tokens.
void apply_generation_config(const GenerationConfig& config, GenerateRequest& request);

// Timing of one request. Times are host wall-clock seconds.
struct Statistics {
  std::int64_t prompt_tokens = 0;
  std::int64_t new_tokens = 0;
  double prefill_seconds = 0;                // of passes with pieces of this prompt, all of each
  double time_to_first_token_seconds = 0;    // from start() to the first token
  double decode_seconds = 0;                 // spent in decode steps after the first token
  double queue_seconds = 0;                  // waiting for a place and for memory
  std::int64_t preemptions = 0;              // how often its memory went to older sequences
  double recompute_seconds = 0;              // spent on what that had cost
  std::int64_t prefix_hit_tokens = 0;        // of the prompt, that were in the prefix cache or
                                             // computed for another sample
  std::int64_t decode_steps = 0;             // in which the model has computed this text's tokens
  std::int64_t draft_steps = 0;              // of these, in which a draft had proposed some
  std::int64_t draft_proposed = 0;           // tokens that it proposed
  std::int64_t draft_accepted = 0;           // of these, that were the text's
  double mean_accepted = 0;                  // draft_accepted / draft_steps, 0 if undefined
  double seconds_per_token = 0;              // decode_seconds / (new_tokens - 1), 0 if undefined
  double tokens_per_second = 0;              // its inverse
  double bytes_per_second = 0;               // weights and KV cache read by decode / decode_seconds
  double read_ceiling_bytes_per_second = 0;  // of Engine::measure_read_ceiling(); 0: not measured
  double ceiling_share = 0;                  // bytes_per_second / ceiling; 0: not measured
};

struct GenerateResult {
  std::string text;  // without the prompt
  std::vector<TokenId> prompt_tokens;
  std::vector<TokenId> tokens;        // new tokens, the stop token included
  std::vector<SampledToken> sampled;  // with log-probabilities if asked for, else empty
  // prompt_scores[i] is of prompt_tokens[i + 1], if asked for, else empty. Filled piece by piece.
  std::vector<ScoredToken> prompt_scores;
  std::optional<FinishReason> finish_reason;  // nothing while it runs, or after an error
  Statistics statistics;
};

// One step's news of one sequence.
struct GenerateEvent {
  std::size_t index = 0;                      // which request
  std::optional<SampledToken> token;          // nothing in a last event that only brings text
  std::string text;                           // well-formed UTF-8, may be empty
  std::optional<FinishReason> finish_reason;  // set in the last event of a sequence
};

// What an engine's scheduler has to do, and what it has done since the engine was opened.
struct ServingStatistics {
  std::int64_t sequences_active = 0;   // hold memory
  std::int64_t sequences_waiting = 0;  // for a place or for memory
  std::int64_t kv_pages = 0;           // of 64 positions, that there should be at most
  std::int64_t kv_pages_in_use = 0;    // of sequences and of cached prefixes
  std::int64_t kv_pages_cached = 0;    // of these, that no sequence uses
  std::int64_t prompt_tokens = 0;      // of all sequences that have begun
  std::int64_t prefix_hit_tokens = 0;  // of these, that were in the prefix cache or computed for
                                       // another sample: the hit rate is their share
  std::int64_t preemptions = 0;
};

// Running generation of one or more sequences. It is computed ahead of next(), together with what
// other threads have started. Destroying it frees the sequences. Keep the Engine alive as long as
// its generations.
class Generation {
 public:
  virtual ~Generation() = default;
  // Waits for the next event; nothing when all sequences have ended.
  // Errors: those of the backend; interrupted (then the results end with `cancelled`). After one
  // the generation has ended.
  virtual std::optional<GenerateEvent> next() = 0;
  // The events that are there now; does not wait, nor ask EngineOptions::interrupted. After
  // cancel() nothing comes until the sequences are gone. Errors: those of the backend.
  virtual std::vector<GenerateEvent> take() = 0;
  // Whether all events have come out.
  virtual bool has_ended() const noexcept = 0;
  // Ends all sequences with `cancelled` behind what next() has returned, within a moment: a step
  // that runs for nobody else is given up where it takes long. May be called from any thread and
  // from a signal handler.
  virtual void cancel() noexcept = 0;
  // Results so far, one for each request; final after next() has returned nothing.
  virtual const std::vector<GenerateResult>& results() const noexcept = 0;
};

// Log-probability of a text, token by token.
struct ScoreResult {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;  // logprobs[i] of tokens[i + 1] after tokens[0..i]; natural log
  double total = 0;             // their sum
};

// A text in two parts, both of at least one token: the log-probability of the second after the
// first is wanted.
struct LoglikelihoodRequest {
  std::vector<TokenId> context;
  std::vector<TokenId> continuation;
};

struct LoglikelihoodOptions {
  std::int32_t num_top = 0;  // how many of the most likely tokens to tell at each place; 0..100
  // Called after each request with requests done and in all; returns false to cancel.
  std::function<bool(std::int64_t done, std::int64_t total)> progress = {};
};

struct LoglikelihoodResult {
  std::vector<ScoredToken> tokens;  // of the continuation
  double total = 0;                 // sum of their log-probabilities
  bool is_greedy = false;           // each of them is the likeliest of all ids, padded ones too:
                                    // greedy decoding with allow_padded_ids gives them
};

enum class PerplexityMethod {
  each_token,        // every token but the text's first is scored once and counts once
  transformers_docs  // the loop of huggingface.co/docs/transformers/perplexity, number for number:
                     // windows weighted by their new tokens less one
};

struct PerplexityOptions {
  std::int64_t context = 0;  // window length in tokens, >= 2; 0: the longest the engine allows
  std::int64_t stride = 0;   // tokens a window moves on, in [1, context] (from 2 on for
                             // transformers_docs); 0: half the context
  PerplexityMethod method = PerplexityMethod::each_token;
  // Called after each window with tokens done and in all; returns false to cancel.
  std::function<bool(std::int64_t done, std::int64_t total)> progress;
};

struct PerplexityResult {
  double perplexity = 0;     // exp(mean negative log-likelihood a scored token)
  double mean_nll = 0;       // in nats
  double bits_per_byte = 0;  // NLL / ln 2 / bytes of the text of the scored tokens; 0 for token
                             // input and for transformers_docs
  std::int64_t scored_tokens = 0;
  std::int64_t total_tokens = 0;
  double seconds = 0;
};

// Decode steps of one sequence that stays at one length.
struct DecodeTiming {
  double prefill_seconds = 0;             // from the prompt to its first new token
  std::vector<double> seconds_per_token;  // of each burst of steps: the host's time by their number
  double bytes_per_token = 0;             // weights and KV cache that a step reads, on average
};

struct EngineInfo {
  std::string device;  // "cpu", "cuda"
  std::string device_description;
  std::string device_reason;  // why "auto" chose it
  DType kv_dtype = DType::float32;
  std::int64_t kv_bytes_per_position = 0;
  std::int64_t max_positions = 0;
  std::int64_t kv_bytes = 0;  // EngineOptions::kv_bytes, or what stands in its place
  std::string draft = {};     // "ngram" or the draft's folder; empty: none
};

// May be called from several threads: what they generate shares steps, and other calls take turns
// with these.
class Engine {
 public:
  // Opens the checkpoint folder `path` (config.json, weights, tokenizer.json), or the one that a
  // name on the hub stands for in the local cache (find_checkpoint() in hub.hpp), on a device. A
  // folder without tokenizer.json gives an engine that takes and gives token ids only.
  // Errors: those of Model::open and Tokenizer::open; invalid_argument and unsupported for the
  // options. What a user should know though it runs is in warnings().
  static std::unique_ptr<Engine> open(const std::filesystem::path& path,
                                      const EngineOptions& options = {});
  // The same of a model that is open already (EngineOptions::revision says nothing then). Without a
  // tokenizer it takes and gives token ids only.
  static std::unique_ptr<Engine> open(std::shared_ptr<const Model> model,
                                      std::shared_ptr<const Tokenizer> tokenizer,
                                      const EngineOptions& options = {});
  virtual ~Engine() = default;

  virtual const Model& model() const noexcept = 0;
  // Errors: not_found if the folder has no tokenizer.
  virtual const Tokenizer& tokenizer() const = 0;
  virtual bool has_tokenizer() const noexcept = 0;
  virtual EngineInfo info() const = 0;
  // Those of the model and the tokenizer, and of how they fit: one message each, often none.
  virtual const std::vector<std::string>& warnings() const noexcept = 0;

  // Checks everything, hands the requests to the scheduler and returns before the first token.
  // `on_news` is called on the scheduler's thread when take() may have something new. It must
  // return at once; one call may still run when the generation is gone.
  // Errors: invalid_argument, out_of_range, out_of_memory if a request may need more than kv_bytes.
  virtual std::unique_ptr<Generation> start(std::vector<GenerateRequest> requests,
                                            std::function<void()> on_news = {}) = 0;

  virtual ServingStatistics serving_statistics() const = 0;

  // Saves keys and values of a prompt's beginning to a file, so that a long prompt is read once:
  // whole pages of 64 positions. Reads the prompt as start() does, unless the prefix cache has it.
  // The file appears whole or not at all, in the place of what was there. Returns for how many
  // tokens it stands. Errors: invalid_argument (a prompt too short to save, no prefix cache,
  // interventions), out_of_range (a token), out_of_memory, and not_found, permission_denied or io
  // of the file.
  virtual std::int64_t save_prompt_cache(std::span<const TokenId> prompt,
                                         const std::filesystem::path& file) = 0;
  // Puts them into the prefix cache, where all texts that begin with their tokens find them until
  // others need the memory: texts are what they would be without, bit for bit. `prompt`, if not
  // empty, has to begin with the file's tokens. Returns their number.
  // Errors: invalid_argument if the file is of another model (its shape or weights), kv_dtype,
  // device, mode or version, or of another prompt; malformed if it is damaged or no such file;
  // out_of_memory; not_found, permission_denied, io.
  virtual std::int64_t load_prompt_cache(const std::filesystem::path& file,
                                         std::span<const TokenId> prompt = {}) = 0;

  // Runs requests to their end. `on_event` sees every event and returns false to cancel.
  using EventCallback = std::function<bool(const GenerateEvent&)>;
  std::vector<GenerateResult> generate(std::vector<GenerateRequest> requests,
                                       const EventCallback& on_event = {});
  GenerateResult generate(GenerateRequest request, const EventCallback& on_event = {});

  // Logits at every position: float32 [tokens.size(), vocab_size] into `logits`.
  virtual void logits(std::span<const TokenId> tokens, std::span<float> logits) = 0;
  // The last token is never fed, so a context of n positions scores up to n + 1 tokens.
  virtual ScoreResult score(std::span<const TokenId> tokens) = 0;
  // The same for several texts, in their order. An error of one names its index.
  virtual std::vector<ScoreResult> score(std::span<const std::vector<TokenId>> texts) = 0;

  // Log-probabilities of continuations after their contexts, in the order of the requests; after a
  // cancellation only of those that were done. All requests are checked before the first is
  // computed. Errors: invalid_argument, out_of_range; those of one among several name its index.
  virtual std::vector<LoglikelihoodResult> loglikelihood(
      std::span<const LoglikelihoodRequest> requests, const LoglikelihoodOptions& options) = 0;
  // A pair of texts in tokens, as lm-evaluation-harness divides them: white space at the end of the
  // context goes to the continuation; the two are encoded as one text, and what comes after as many
  // tokens as the context alone has is the continuation. An empty context stands for the model's
  // bos_token_id (or else eos_token_id), unless the continuation begins with that.
  // Errors: not_found without a tokenizer; invalid_argument if a part has no token.
  LoglikelihoodRequest encode_pair(std::string_view context, std::string_view continuation) const;
  // `bytes`: length of the text that the scored tokens, all but the first, stand for, for
  // bits_per_byte; 0 if unknown.
  virtual PerplexityResult perplexity(std::span<const TokenId> tokens, std::int64_t bytes,
                                      const PerplexityOptions& options) = 0;
  // The same of a text. Of its bytes those of the first token are left out, unless that is one that
  // the tokenizer puts before the text.
  PerplexityResult perplexity(std::string_view text, bool add_special_tokens,
                              const PerplexityOptions& options);

  // Activations of `tokens`, in the order of the names and of the layers. They are not checked:
  // where the model computes NaN there is NaN. Two names of one activation share its memory.
  // Errors: invalid_argument (no tokens or too many, a name that is not known: the message lists
  // those that are), out_of_range (a token or a layer), out_of_memory.
  virtual std::vector<NamedActivation> hidden_states(std::span<const TokenId> tokens,
                                                     const HiddenStatesOptions& options) = 0;

  // From now on adds scale x vectors to the residual streams; instead of what was added before; no
  // vectors: nothing any more. For each layer one vector at most. Errors: invalid_argument (sizes,
  // a layer twice), out_of_range (a layer), non_finite (a value, also after scaling).
  //
  // This and ablate() hold for all that begins after they return: generations, scores, logits,
  // hidden states. What has begun before (a Generation with its start()) ends as it began, so a
  // result depends on its request and on the interventions at its beginning, and on nothing else.
  // Without interventions the same code runs as if there were none.
  virtual void steer(std::vector<SteeringVector> vectors, float scale = 1.0f) = 0;
  // From now on leaves these parts out, and only these; {} brings all back. Errors:
  // invalid_argument (a part twice), out_of_range (a layer, a head).
  virtual void ablate(const Ablation& ablation) = 0;

  // Reads the weights once with all threads, without computing, and returns bytes per second: what
  // decoding could reach at best. Measured once (the best of several passes) and remembered.
  virtual double measure_read_ceiling() = 0;

  // Prefills `prompt` and decodes at least `num_tokens` greedily, timed, in bursts of up to 16
  // steps that the host starts at once. After each burst the sequence is cut back to the prompt, or
  // to what lets the next burst end with the context. A first burst is not timed. Errors:
  // invalid_argument (no prompt, no room for a step behind it, num_tokens < 1), out_of_range,
  // out_of_memory.
  virtual DecodeTiming time_decode(std::span<const TokenId> prompt, std::int64_t num_tokens) = 0;
  // What each SM of a GPU does in one greedy decode step behind `prompt`.
  // Errors: those of time_decode; unsupported on the CPU.
  virtual std::vector<TimelineEvent> record_timeline(std::span<const TokenId> prompt) = 0;
};

}  // namespace clusterfusion
