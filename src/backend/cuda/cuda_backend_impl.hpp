// The Backend of cuda_backend.hpp: its sequences, and how they reach the kernels. What it does lies
// in files by its parts: cuda_backend.cpp, _prefill, _one_row, _rows and _verify.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/device_tensor.hpp"
#include "backend/cuda/gemm/gemm_decoder.hpp"
#include "backend/cuda/interventions/device_interventions.hpp"
#include "backend/cuda/kv_pool.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/prefill.hpp"
#include "backend/cuda/read_ceiling.hpp"
#include "backend/cuda/sampling/device_sampler.hpp"
#include "backend/cuda/stream/stream_decoder.hpp"
#include "backend/sequences.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

// What takes a look at all logits together: the decode kernel by itself knows greedy and plain
// temperature sampling.
inline bool needs_sampler(const SamplingParams& sampling) {
  return sampling.num_logprobs >= 0 || sampling.repetition_penalty != 1.0f ||
         (sampling.temperature > 0 &&
          (sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0));
}

struct Sequence : PagedSequence<char*> {
  using PagedSequence::PagedSequence;

  // Of the next `steps` decode steps, how many may share a launch.
  std::int32_t steps_alike(std::int32_t steps) const {
    return interventions != nullptr && length < interventions->steered_positions() ? 1 : steps;
  }

  std::shared_ptr<DeviceInterventions> interventions;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::shared_ptr<const Model> model, const BackendOptions& options);

  ~CudaBackend() override { cudaStreamDestroy(stream_); }

  const BackendInfo& info() const noexcept override { return info_; }

  SequenceId create_sequence(const SamplingParams& sampling) override;

  SequenceId create_sequence(const SamplingParams& sampling, std::span<const TokenId> tokens,
                             std::span<const KvPageId> pages,
                             std::shared_ptr<const Interventions> interventions) override;

  void intervene(SequenceId id, std::shared_ptr<const Interventions> interventions) override;

  std::shared_ptr<DLTensor> allocate_activation(std::int64_t tokens, std::int64_t hidden) override {
    return make_device_tensor(tokens, hidden);
  }

  KvPageId hold_page(SequenceId id, std::int64_t index) override;
  void drop_page(KvPageId page) override { pool_.give_back(reinterpret_cast<char*>(page)); }
  void read_page(KvPageId page, std::span<std::byte> content) override;
  KvPageId add_page(std::span<const std::byte> content) override;
  std::int64_t kv_pages_in_use() const override { return pool_.in_use(); }

  SampledToken sample(SequenceId id, std::span<const float> logits) override {
    return find(id).sampler.sample(logits);
  }

  void release_sequence(SequenceId id) override;
  std::int64_t length(SequenceId id) const override { return sequences_.find(id).length; }
  void reserve(SequenceId id, std::int64_t positions) override;
  void truncate(SequenceId id, std::int64_t length) override;
  void prefill(SequenceId id, std::span<const TokenId> tokens,
               const PrefillOutput& output) override;
  void prefill_together(std::span<const PrefillPart> parts) override;
  void decode(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
              std::int32_t steps, std::span<SampledToken> sampled,
              std::span<float> logits) override;
  void verify(std::span<Proposal> batch) override;

  std::vector<TimelineEvent> record_timeline(SequenceId id, TokenId input) override;

  double measure_read_ceiling() override {
    return cuda::measure_read_ceiling(weights_.weights().as<>(), weights_.weights().bytes());
  }

 private:
  // Whether the decode kernel for one row takes this model.
  bool streams() const noexcept { return plan_.stages > 0; }
  // How a model that it does not take is decoded.
  std::string_view path() const noexcept {
    return gemm_decoder_ ? "as a series of kernels" : "layer by layer";
  }
  void prepare();
  // By default nine tenths of what the weights and scratch memory have left.
  std::int64_t kv_pages(std::int64_t bytes) const;
  // Replaces a page that others have too by a copy.
  void make_own(char*& page);
  Sequence& find(SequenceId id) { return sequences_.find(id); }
  // The pages up to `positions`, of which those that are to be written are the sequence's alone.
  void grow(Sequence& sequence, std::int64_t positions);
  std::int32_t drawable_vocab_size(const SamplingParams& sampling) const;
  // Room for the logits of one row.
  std::span<float> vocab_logits() {
    return std::span(host_logits_).first(static_cast<std::size_t>(config_.vocab_size));
  }
  static void require_finite(std::int32_t chosen, std::int64_t position);

  // Prompts (cuda_backend_prefill.cpp).
  // How many of the first parts one pass takes.
  std::size_t parts_of_pass(std::span<const PrefillPart> parts);
  PromptPiece piece_of(const PrefillPart& part, const PrefillOutput& output);
  void prefill_passes(std::span<const PrefillPart> parts);
  // What samplers choose from comes to the host.
  void prefill_pass(std::span<const PrefillPart> parts);
  // Pieces of one token, of as many sequences as a pass takes; the host chooses. What is thrown
  // leaves the sequences as they were.
  void decode_by_layers(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                        std::int32_t steps, std::span<SampledToken> sampled,
                        std::span<float> logits);

  // The kernel for one row (cuda_backend_one_row.cpp).
  void allocate_scratch();
  // `steps` steps of one sequence in one launch (at most steps_alike()): the first one's input is
  // given, those of later ones are what was chosen before. Errors: non_finite, with the sequence as
  // it was.
  void run(Sequence& sequence, TokenId input, std::int64_t steps, std::int64_t first_scored,
           bool want_logits, float temperature);
  void send(const Sequence& sequence, const TokenId& input);
  void launch(const DecodeParams& params);
  // For `steps` steps from `first_position` on, and what they chose. Errors: non_finite.
  void wait(std::int64_t first_position, std::int64_t steps, std::int64_t first_scored);
  void copy_logits(std::int64_t row, std::span<float> to);
  // Where the streaming kernel has only one row.
  void decode_one_by_one(std::span<const SequenceId> sequences, std::span<const TokenId> inputs,
                         std::int32_t steps, std::span<SampledToken> sampled,
                         std::span<float> logits);
  void decode_in_one_launch(Sequence& sequence, TokenId input, std::int32_t steps,
                            std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                            std::span<float> logits);
  // A launch for each step, whose logits come to the host, where the token is chosen: for what the
  // device does not know.
  void decode_with_host(Sequence& sequence, TokenId input, std::int32_t steps,
                        std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                        std::span<float> logits);
  // A launch for each step, and behind it the sampler's, which takes the step's logits and leaves
  // the next step's input; the host waits for the last.
  void decode_with_sampler(Sequence& sequence, TokenId input, std::int32_t steps,
                           std::span<SampledToken> sampled, std::size_t b, std::size_t batch,
                           std::span<float> logits);

  // Many rows in a step (cuda_backend_rows.cpp).
  // Some sequences of a decode(), by their numbers in the batch.
  struct DecodeCall {
    std::span<const SequenceId> sequences;
    std::span<const TokenId> inputs;
    std::span<SampledToken> sampled;
    std::span<float> logits;
    std::span<const std::size_t> rows;
    std::int32_t steps;
    std::size_t count() const { return rows.size(); }
    SequenceId sequence(std::size_t row) const { return sequences[rows[row]]; }
    TokenId input(std::size_t row) const { return inputs[rows[row]]; }
    SampledToken* room(std::int32_t step, std::size_t row) const {
      return sampled.empty() ? nullptr : &sampled[step * sequences.size() + rows[row]];
    }
  };
  void prepare_rows();
  // Whether a step takes several rows.
  bool decodes_rows() const noexcept { return stream_decoder_ || gemm_decoder_; }
  std::size_t max_rows() const noexcept {
    return static_cast<std::size_t>(gemm_decoder_ ? kMaxGemmRows : plan::kMaxRows);
  }
  // The quicker one of those that there are; the bits are the same.
  RowDecoder& decoder_of(std::size_t rows);
  DecodeRow row_of(const Sequence& sequence, TokenId input, bool chooses) const;
  // Rows whose interventions are the same share launches.
  std::vector<std::vector<std::size_t>> alike_groups(std::span<const SequenceId> sequences,
                                                     std::span<const std::size_t> rows);
  // One sequence, a launch for each step that is steered as its position is.
  void decode_row_by_steps(const DecodeCall& call);
  // All in the same launches; interventions and steps are alike. Errors: non_finite, with the
  // sequences as they were.
  void decode_rows(const DecodeCall& call);
  void tell_interventions(RowDecoder& decoder, const Sequence& sequence);
  void fetch_row_logits(const RowDecoder& decoder, const DecodeCall& call);
  // One sequence, step by step: the host chooses its tokens, for what the device does not know.
  void decode_row_with_host(const DecodeCall& call);
  // A launch for each step, and behind it the samplers of the rows that have one, which leave the
  // next step's inputs.
  void enqueue_with_samplers(RowDecoder& decoder, const DecodeCall& call,
                             std::vector<DecodeRow> rows, std::span<const std::size_t> filtered);
  // Waits for what was enqueued and appends it to the sequences. Errors: non_finite.
  void take_chosen(const RowDecoder& decoder, const DecodeCall& call,
                   std::span<const std::size_t> filtered);

  // Proposals (cuda_backend_verify.cpp).
  // How a sequence's rows of a verify_rows() are chosen from.
  struct VerifiedRows {
    std::size_t first_row = 0;
    std::optional<std::size_t> first_sampler;  // of row_samplers_, one for each row
    bool on_host = false;
  };
  void verify_groups(std::span<Proposal> batch, std::span<const SequenceId> ids);
  // All tokens of the proposals are rows of one step; interventions are alike.
  void verify_rows(std::span<Proposal* const> proposals);
  // Each row's sampler has seen the tokens up to its own.
  void enqueue_samplers(RowDecoder& decoder, const Proposal& proposal, const VerifiedRows& rows);
  // What was computed is there.
  void choose_verified(const RowDecoder& decoder, Proposal& proposal, const VerifiedRows& rows,
                       std::span<const std::int32_t> chosen);

  std::shared_ptr<const Model> model_;
  const ModelConfig config_;
  cudaDeviceProp properties_;
  std::string unstreamed_;  // why the decode kernel does not take the model, if so
  plan::DecodePlan plan_;
  std::int64_t max_positions_;
  DecodeMode mode_;
  DeviceModel weights_;
  KvPool pool_;
  Prefill prefill_;
  InterventionTable interventions_;
  DeviceSampler sampler_;
  std::deque<DeviceSampler> row_samplers_;
  std::optional<StreamDecoder> stream_decoder_;
  std::optional<GemmDecoder> gemm_decoder_;
  BackendInfo info_;
  DeviceMemory counters_, lamport_, logits_, tokens_, page_table_;
  std::vector<float> host_logits_;
  std::vector<std::int32_t> host_chosen_;
  DecodeParams params_{};
  const void* kernel_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Sequences<Sequence> sequences_;
};

}  // namespace clusterfusion::cuda
