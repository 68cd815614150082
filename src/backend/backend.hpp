// The one interface between the engine and the devices.
//
// A backend holds a model's weights (or maps them), a pool of KV pages, and sequences. Batches and
// paged KV are part of the contract; so is sampling, because a device that had to send logits to
// the host for each token would wait for the host.
//
// Numbers: the result for a sequence depends on its own tokens, its interventions and the backend's
// mode only, alone or in a batch with others, and the same calls give the same bits from run to
// run: prefilling n tokens in any number of pieces, beside any others, gives the same bits. On the
// CPU so does decoding them one by one, with any number of threads. On a GPU a prefill is summed in
// another order than decode steps, so these agree up to rounding.
//
// Threads: calls on one Backend must not overlap; the engine sees to it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/activation_output.hpp"
#include "backend/interventions.hpp"
#include "backend/proposal.hpp"
#include "base/host_tensor.hpp"
#include "base/stop_request.hpp"
#include "clusterfusion/decode_mode.hpp"
#include "clusterfusion/error.hpp"
#include "clusterfusion/model.hpp"
#include "clusterfusion/sampling.hpp"
#include "clusterfusion/timeline.hpp"
#include "plan/kv_page.hpp"

namespace clusterfusion {

// Positions in one KV page, for every backend.
inline constexpr std::int64_t kKvPagePositions = plan::kKvPagePositions;

// A page of the KV cache; opaque.
enum class KvPageId : std::uintptr_t {};

// Pages that hold `positions`.
constexpr std::int64_t kv_pages_of(std::int64_t positions) noexcept {
  return (positions + kKvPagePositions - 1) / kKvPagePositions;
}

struct BackendOptions {
  int threads = 0;                 // CPU: worker threads; 0: one for each core this process may use
  std::int64_t max_positions = 0;  // the longest context a sequence may reach; 0: the model's
  // Type of the KV cache. Nothing: float32 on the CPU, the weights' type on a GPU, where there is
  // float32 beside that.
  std::optional<DType> kv_dtype;
  DecodeMode mode = DecodeMode::latency;
  std::int64_t kv_bytes = 0;  // BackendInfo::kv_pages in bytes; 0: the backend's own choice
  // EngineOptions::load_progress.
  std::function<void(std::int64_t done, std::int64_t total)> load_progress = {};
};

struct BackendInfo {
  std::string name;    // "cpu", "cuda"
  std::string device;  // "AMD EPYC ..., 2 threads, AVX3_DL", "NVIDIA H100 ..., 132 SMs"
  DType kv_dtype = DType::float32;
  std::int64_t kv_bytes_per_position = 0;
  std::int64_t max_positions = 0;
  std::int64_t prefill_chunk = 512;  // the engine prefills in pieces of this many tokens, so that a
                                     // prompt can be cancelled and its progress shown
  std::int64_t least_piece = 4;   // tokens that share one read of the weights at hardly any cost: a
                                  // prompt is not cut into smaller pieces for the sake of others
  std::int32_t decode_ahead = 1;  // steps that decode() may run without looking at the host
  // Rows that verify() computes in one step, at most, over all sequences of a batch. 1: it takes a
  // step for each token, so that proposals gain nothing.
  std::int32_t verify_rows = 1;
  // Pages that all sequences and holders together should have at most. The scheduler keeps to it;
  // the backend itself gives more as long as there is memory.
  std::int64_t kv_pages = 0;
  // Whether decoding gives the same bits as prefilling. If not, what was decoded is computed again
  // by decoding.
  bool decodes_as_prefills = false;
  // What the bits of keys and values depend on besides model, tokens and kv_dtype: on the CPU
  // nothing ("cpu"), elsewhere the chip, the mode and the libraries.
  std::string arithmetic = {};

  std::int64_t page_bytes() const noexcept { return kv_bytes_per_position * kKvPagePositions; }
};

// What a prefill is to give back; each part may be absent (empty or null).
struct PrefillOutput {
  // float32 [tokens.size(), vocab]: logits at every position of this piece.
  std::span<float> all_logits;
  // float32 [vocab]: logits at the last position of this piece.
  std::span<float> last_logits;
  // targets[i] is the token whose log-probability after tokens[0..i] is wanted; goes to
  // target_logprobs[i]. A target of -1 is skipped and its logprob left alone. Sizes are equal to
  // each other and to tokens.size(), or zero.
  std::span<const TokenId> targets;
  std::span<float> target_logprobs;
  // Beside target_logprobs, or empty: 1 where the target is the likeliest token (of equally likely
  // ones the one with the lowest id), else 0.
  std::span<std::uint8_t> target_is_likeliest;
  // The token sampled at the last position, with the sequence's SamplingParams.
  SampledToken* sampled = nullptr;
  // Activations of the tokens of this piece.
  std::vector<ActivationOutput> activations = {};
};

// A piece of one sequence's prompt.
struct PrefillPart {
  SequenceId sequence = -1;
  std::span<const TokenId> tokens;
  PrefillOutput output = {};
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const noexcept = 0;

  // A new, empty sequence. The sampler sees every token of the sequence (repetition penalty).
  virtual SequenceId create_sequence(const SamplingParams& sampling) = 0;
  // A new sequence of `tokens`, whose keys and values stand in `pages`, which the caller holds: as
  // many as it takes, computed under the same `interventions` (see intervene()). Pages are shared;
  // one that others have too is copied when this or another sequence comes to write into it.
  virtual SequenceId create_sequence(const SamplingParams& sampling,
                                     std::span<const TokenId> tokens,
                                     std::span<const KvPageId> pages,
                                     std::shared_ptr<const Interventions> interventions) = 0;
  // What changes the way of an empty sequence through the layers, for all its tokens; null:
  // nothing. Errors: unsupported.
  virtual void intervene(SequenceId sequence, std::shared_ptr<const Interventions> interventions) {
    static_cast<void>(sequence);
    if (interventions == nullptr) return;
    throw Error(ErrorKind::unsupported,
                "device \"" + info().name + "\" knows neither steering nor ablation");
  }
  // Memory for an activation: float32 [tokens, hidden], on this device. It may outlive the backend.
  // Errors: out_of_memory.
  virtual std::shared_ptr<DLTensor> allocate_activation(std::int64_t tokens, std::int64_t hidden) {
    return make_host_tensor(tokens, hidden);
  }
  // Lets go of its pages.
  virtual void release_sequence(SequenceId sequence) = 0;
  // Positions that hold keys and values.
  virtual std::int64_t length(SequenceId sequence) const = 0;
  // Makes sure that the sequence can grow to `positions` without further allocation.
  // Errors: out_of_memory with the numbers, invalid_argument past max_positions.
  virtual void reserve(SequenceId sequence, std::int64_t positions) = 0;
  // Forgets positions from `length` on.
  virtual void truncate(SequenceId sequence, std::int64_t length) = 0;

  // The page of positions 64 `index` ... of a sequence that has reserved them, with one holder
  // more: what is in it stays until drop_page(), whatever becomes of the sequence.
  virtual KvPageId hold_page(SequenceId sequence, std::int64_t index) = 0;
  // One holder less; the last, be it a sequence or not, gives the page back to the pool.
  virtual void drop_page(KvPageId page) = 0;
  // The bytes of a page that somebody has, all written: BackendInfo::page_bytes().
  virtual void read_page(KvPageId page, std::span<std::byte> content) = 0;
  // A page of such bytes, with one holder. Errors: out_of_memory.
  virtual KvPageId add_page(std::span<const std::byte> content) = 0;
  // Pages that sequences and holders have now, each counted once.
  virtual std::int64_t kv_pages_in_use() const = 0;

  // Chooses the token behind the sequence's, as prefill() does from these logits: float32 [vocab].
  virtual SampledToken sample(SequenceId sequence, std::span<const float> logits) = 0;

  // Appends tokens (at least one) to a sequence and computes what `output` asks for. A token has
  // the same bits in whichever pieces its text is prefilled.
  // Errors: out_of_range (token id, with its index), invalid_argument (context full),
  // non_finite (the logits of an asked-for position are not finite: says layer or tensor if known).
  virtual void prefill(SequenceId sequence, std::span<const TokenId> tokens,
                       const PrefillOutput& output) = 0;

  // The same for pieces of different sequences in one pass, at most info().prefill_chunk tokens in
  // all; each has the bits that it has alone. What is thrown, for any of them, leaves all as they
  // were.
  virtual void prefill_together(std::span<const PrefillPart> parts);

  // Decodes `steps` tokens (1 .. info().decode_ahead) for each of a batch of different sequences.
  // inputs[b] is the token to append first; each sampled token is the next step's input.
  //   sampled: [steps, batch], may be empty only if steps is 1
  //   logits:  float32 [batch, vocab] of the last step, or empty
  // On return, each sequence holds `steps` more positions (the last sampled token is not among
  // them). The host may drop surplus tokens with truncate().
  virtual void decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                      std::int32_t steps, std::span<SampledToken> sampled,
                      std::span<float> logits) = 0;

  // Decode steps whose inputs somebody has guessed, for a batch of different sequences: appends the
  // first token of each proposal, chooses the token behind it, and goes on while the token chosen
  // is the one proposed next. A proposal has at most verify_rows tokens, or any number where that
  // is 1. What is chosen has the bits of single steps, and on return each sequence holds as many
  // positions more as tokens were chosen for it.
  // Errors: those of decode(), with the sequences as they were. One that comes behind a sequence's
  // first token only ends its run: the next step is to meet it, if ever it is made.
  virtual void verify(std::span<Proposal> batch) { verify_by_steps(*this, batch); }

  // What prefill(), decode(), verify() and measure_read_ceiling() ask while they compute, if it is
  // not empty. Where it says true they throw Stopped; each sequence then holds what it held before
  // the call. A device whose calls are short need not ask.
  virtual void set_stop_request(StopRequest stop) { static_cast<void>(stop); }

  // Bytes per second at which this device reads the model's weights when it does nothing else; the
  // best of several passes. Errors: none beyond those of the device.
  virtual double measure_read_ceiling() = 0;

  // Decodes one greedy step of `sequence`, as decode() would with `input`, and records what each SM
  // did when. The sequence holds one more position on return.
  // Errors: those of decode(); unsupported where no kernel writes down its times.
  virtual std::vector<TimelineEvent> record_timeline(SequenceId sequence, TokenId input) {
    static_cast<void>(sequence);
    static_cast<void>(input);
    throw Error(ErrorKind::unsupported,
                "a timeline shows the SMs of a GPU; there is none to record on device \"" +
                    info().name + "\": use device \"cuda\" on a machine with a supported GPU");
  }
};

// Backends of this build. `make_cpu_backend` always exists.
std::unique_ptr<Backend> make_cpu_backend(std::shared_ptr<const Model> model,
                                          const BackendOptions& options);

}  // namespace clusterfusion
