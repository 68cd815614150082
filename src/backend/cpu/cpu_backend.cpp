// Sequences, checks and sampling around the forward pass.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cpu/kernels.hpp"
#include "backend/cpu/kv_pool.hpp"
#include "backend/cpu/transformer.hpp"
#include "backend/sequences.hpp"
#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "base/thread_pool.hpp"
#include "model/decoded_tensors.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion {
namespace cpu {
namespace {

// Positions whose logits are in memory at a time where the caller did not ask for them.
// More rows of a batch read the LM head once more.
constexpr std::int64_t kLogitRows = 128;
constexpr int kMaxThreads = 4096;
constexpr int kCeilingPasses = 5;
constexpr std::int64_t kReadTaskBytes = 1 << 20;

struct Sequence : PagedSequence<std::byte*> {
  using PagedSequence::PagedSequence;
  std::shared_ptr<const Interventions> interventions;
};

std::string cpu_model_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

int checked_threads(int threads) {
  require(threads >= 0 && threads <= kMaxThreads, ErrorKind::invalid_argument,
          "threads must be 0 (one for each core) to {}, but is {}", kMaxThreads, threads);
  return threads == 0 ? usable_cores() : threads;
}

// How many pages sequences should have at most: by default half of the memory that is left, and the
// longest context in any case.
std::int64_t kv_pages(std::int64_t bytes, std::int64_t max_positions, std::int64_t page_bytes) {
  if (bytes == 0) {
    return std::max(available_memory() / 2 / page_bytes, kv_pages_of(max_positions));
  }
  return kv_pages_in(bytes, page_bytes);
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(std::shared_ptr<const Model> model, const BackendOptions& options)
      : model_(std::move(model)),
        config_(model_->config()),
        threads_(checked_threads(options.threads)),
        pool_(
            {options.kv_dtype.value_or(DType::float32), config_.head_dim, padded(config_.head_dim)},
            config_.num_layers, config_.kv_heads()),
        transformer_(*model_, pool_, threads_),
        sequences_(config_, info_) {
    info_.name = "cpu";
    info_.device = fmt::format("{}, {} thread{}, {}", cpu_model_name(), threads_.size(),
                               threads_.size() == 1 ? "" : "s", target_name());
    info_.kv_dtype = pool_.layout().dtype;
    info_.kv_bytes_per_position = pool_.page_bytes() / kKvPagePositions;
    info_.max_positions = longest_context(config_, options.max_positions);
    info_.prefill_chunk = transformer_.max_rows();
    info_.kv_pages = kv_pages(options.kv_bytes, info_.max_positions, pool_.page_bytes());
    info_.verify_rows = static_cast<std::int32_t>(std::min(transformer_.max_rows(), kLogitRows));
    info_.decodes_as_prefills = true;
    info_.arithmetic = "cpu";
  }

  const BackendInfo& info() const noexcept override { return info_; }

  SequenceId create_sequence(const SamplingParams& sampling) override {
    return sequences_.create(sampling);
  }

  SequenceId create_sequence(const SamplingParams& sampling, std::span<const TokenId> tokens,
                             std::span<const KvPageId> pages,
                             std::shared_ptr<const Interventions> interventions) override {
    sequences_.check.pages(tokens, pages);
    const SequenceId id = create_sequence(sampling);
    Sequence& sequence = sequences_.find(id);
    sequence.interventions = std::move(interventions);
    sequence.append(tokens);
    for (const KvPageId page : pages) {
      sequence.pages.push_back(reinterpret_cast<std::byte*>(page));
      pool_.share(sequence.pages.back());
    }
    return id;
  }

  void intervene(SequenceId id, std::shared_ptr<const Interventions> interventions) override {
    Sequence& sequence = sequences_.find(id);
    sequences_.check.intervene(id, sequence);
    sequence.interventions = std::move(interventions);
  }

  KvPageId hold_page(SequenceId id, std::int64_t index) override {
    std::byte* const page = sequences_.find(id).pages.at(static_cast<std::size_t>(index));
    pool_.share(page);
    return KvPageId{reinterpret_cast<std::uintptr_t>(page)};
  }
  void drop_page(KvPageId page) override { pool_.let_go(reinterpret_cast<std::byte*>(page)); }
  void read_page(KvPageId page, std::span<std::byte> content) override {
    std::memcpy(content.data(), reinterpret_cast<const std::byte*>(page), content.size());
  }
  KvPageId add_page(std::span<const std::byte> content) override {
    std::vector<std::byte*> page;
    pool_.grow(page, 1);
    std::memcpy(page[0], content.data(), content.size());
    return KvPageId{reinterpret_cast<std::uintptr_t>(page[0])};
  }
  std::int64_t kv_pages_in_use() const override { return pool_.in_use(); }

  SampledToken sample(SequenceId id, std::span<const float> logits) override {
    return sequences_.find(id).sampler.sample(logits);
  }

  void release_sequence(SequenceId id) override {
    pool_.shrink(sequences_.find(id).pages, 0);
    sequences_.erase(id);
  }

  std::int64_t length(SequenceId id) const override { return sequences_.find(id).length; }

  void reserve(SequenceId id, std::int64_t positions) override {
    Sequence& sequence = sequences_.find(id);
    sequences_.check.reserve(id, positions);
    grow(sequence, positions);
  }

  void truncate(SequenceId id, std::int64_t length) override {
    Sequence& sequence = sequences_.find(id);
    sequences_.check.truncate(id, sequence, length);
    sequence.truncate(length);
  }

  void prefill(SequenceId id, std::span<const TokenId> tokens,
               const PrefillOutput& output) override;
  void prefill_together(std::span<const PrefillPart> parts) override;
  void decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs, std::int32_t steps,
              std::span<SampledToken> sampled, std::span<float> logits) override;
  void verify(std::span<Proposal> batch) override;
  double measure_read_ceiling() override;
  void set_stop_request(StopRequest stop) override { threads_.set_stop_request(std::move(stop)); }

 private:
  // The pages up to `positions`, of which those that are to be written are the sequence's alone.
  void grow(Sequence& sequence, std::int64_t positions) {
    const std::int64_t pages = kv_pages_of(positions);
    const std::int64_t had = std::ssize(sequence.pages);
    for (std::int64_t p = sequence.length / kKvPagePositions; p < std::min(had, pages); ++p) {
      pool_.make_own(sequence.pages[static_cast<std::size_t>(p)]);
    }
    if (pages > had) pool_.grow(sequence.pages, pages);
  }

  void require_finite(std::span<const float> logits, std::int64_t position, SequenceId id) const;
  // At most Transformer::max_rows() tokens in all, of sequences that have pages for them.
  void prefill_pass(std::span<const PrefillPart> parts);
  // Whose logits are wanted.
  struct AskedRow {
    const PrefillPart* part;
    Sequence* sequence;
    std::int64_t row;       // of the pass
    std::int64_t position;  // in the sequence
    std::size_t index;      // of the part's tokens
  };
  static void ask(const PrefillPart& part, Sequence& sequence, std::int64_t first_row,
                  std::vector<AskedRow>& asked);
  static std::size_t block_of(std::span<const AskedRow> asked, std::size_t begin);
  void answer(std::span<const AskedRow> asked);
  // Members [begin, end) of a batch: at most Transformer::max_rows().
  void decode_rows(std::span<const SequenceId> ids, std::span<const TokenId> inputs,
                   std::span<Sequence* const> sequences, std::size_t begin, std::size_t end,
                   std::span<SampledToken> sampled, std::span<float> logits);
  // At most verify_rows rows.
  void verify_rows(std::span<Proposal> batch, std::span<Sequence* const> sequences);
  float* logit_rows(std::size_t rows) {
    logits_.resize(std::max(logits_.size(), rows * static_cast<std::size_t>(config_.vocab_size)));
    return logits_.data();
  }

  std::shared_ptr<const Model> model_;
  const ModelConfig& config_;
  ThreadPool threads_;
  KvPool pool_;
  Transformer transformer_;
  BackendInfo info_;
  Sequences<Sequence> sequences_;
  std::vector<float> logits_;  // scratch, at most kLogitRows rows
};

void CpuBackend::require_finite(std::span<const float> logits, std::int64_t position,
                                SequenceId id) const {
  require(all_finite(logits.data(), config_.vocab_size), ErrorKind::non_finite,
          "the logits at position {} of sequence {} are not finite: the checkpoint holds NaN or "
          "infinity, or its numbers overflow float32",
          position, id);
}

void CpuBackend::prefill(SequenceId id, std::span<const TokenId> tokens,
                         const PrefillOutput& output) {
  Sequence& sequence = sequences_.find(id);
  sequences_.check.prefill(id, sequence, tokens, output);
  grow(sequence, sequence.length + std::ssize(tokens));
  prefill_in_pieces(sequence, tokens, transformer_.max_rows(), output, config_.hidden_size,
                    [&](std::span<const TokenId> piece, const PrefillOutput& its_output) {
                      const PrefillPart part{id, piece, its_output};
                      prefill_pass({&part, 1});
                    });
}

void CpuBackend::prefill_together(std::span<const PrefillPart> parts) {
  sequences_.check.prefill_together(parts);
  std::vector<std::int64_t> lengths;
  for (const PrefillPart& part : parts) {
    Sequence& sequence = sequences_.find(part.sequence);
    sequences_.check.prefill(part.sequence, sequence, part.tokens, part.output);
    lengths.push_back(sequence.length);
  }
  for (const PrefillPart& part : parts) {
    Sequence& sequence = sequences_.find(part.sequence);
    grow(sequence, sequence.length + std::ssize(part.tokens));
  }
  try {
    prefill_pass(parts);
  } catch (...) {
    for (std::size_t i = 0; i < parts.size(); ++i) {
      sequences_.find(parts[i].sequence).truncate(lengths[i]);
    }
    throw;
  }
}

void CpuBackend::prefill_pass(std::span<const PrefillPart> parts) {
  std::vector<Segment> segments;
  std::vector<AskedRow> asked;
  std::int64_t row = 0;
  for (const PrefillPart& part : parts) {
    Sequence& sequence = sequences_.find(part.sequence);
    segments.push_back({part.tokens, sequence.length, sequence.pages, sequence.interventions.get(),
                        part.output.activations});
    ask(part, sequence, row, asked);
    row += std::ssize(part.tokens);
  }
  transformer_.run(segments);
  for (const PrefillPart& part : parts) sequences_.find(part.sequence).append(part.tokens);
  for (std::size_t begin = 0; begin < asked.size();) {
    const std::size_t count = block_of(asked, begin);
    answer(std::span(asked).subspan(begin, count));
    begin += count;
  }
}

// The rows whose logits somebody wants, of a part that begins at `first_row` of the pass.
void CpuBackend::ask(const PrefillPart& part, Sequence& sequence, std::int64_t first_row,
                     std::vector<AskedRow>& asked) {
  const PrefillOutput& output = part.output;
  const bool last = !output.last_logits.empty() || output.sampled != nullptr;
  for (std::size_t i = 0; i < part.tokens.size(); ++i) {
    const bool has_target = !output.targets.empty() && output.targets[i] != -1;
    if (output.all_logits.empty() && !has_target && !(last && i + 1 == part.tokens.size()))
      continue;
    const auto offset = static_cast<std::int64_t>(i);
    asked.push_back({&part, &sequence, first_row + offset, sequence.length + offset, i});
  }
}

// How many rows from `begin` on are computed at once: up to kLogitRows, with their logits in
// scratch memory, or in that of the one part that asks for all.
std::size_t CpuBackend::block_of(std::span<const AskedRow> asked, std::size_t begin) {
  const auto target = [](const AskedRow& row) {
    return row.part->output.all_logits.empty() ? nullptr : row.part;
  };
  std::size_t count = 1;
  while (count < kLogitRows && begin + count < asked.size() &&
         target(asked[begin + count]) == target(asked[begin])) {
    ++count;
  }
  return count;
}

void CpuBackend::answer(std::span<const AskedRow> asked) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  const std::span<float> own = asked[0].part->output.all_logits;
  float* const logits =
      own.empty() ? logit_rows(asked.size()) : own.data() + asked[0].index * vocab;
  std::vector<std::int64_t> rows;
  for (const AskedRow& row : asked) rows.push_back(row.row);
  transformer_.logits(rows, logits);
  threads_.run(std::ssize(asked), [&](std::int64_t i, int) {
    const AskedRow& row = asked[static_cast<std::size_t>(i)];
    const PrefillOutput& output = row.part->output;
    const std::span<const float> one(logits + static_cast<std::size_t>(i) * vocab, vocab);
    require_finite(one, row.position, row.part->sequence);
    if (!output.targets.empty() && output.targets[row.index] != -1) {
      const TargetScore score = score_target(one, output.targets[row.index]);
      output.target_logprobs[row.index] = score.logprob;
      if (!output.target_is_likeliest.empty())
        output.target_is_likeliest[row.index] = score.is_likeliest ? 1 : 0;
    }
    if (row.index + 1 < row.part->tokens.size()) return;
    std::copy_n(one.begin(), output.last_logits.size(), output.last_logits.begin());
    if (output.sampled != nullptr) *output.sampled = row.sequence->sampler.sample(one);
  });
}

void CpuBackend::decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs,
                        std::int32_t steps, std::span<SampledToken> sampled,
                        std::span<float> logits) {
  const std::vector<Sequence*> sequences =
      sequences_.find_batch(ids, inputs, steps, sampled.size(), logits.size());
  for (Sequence* sequence : sequences) grow(*sequence, sequence->length + 1);
  const auto most = static_cast<std::size_t>(transformer_.max_rows());
  try {
    for (std::size_t begin = 0; begin < ids.size(); begin += most) {
      const std::size_t count = std::min(most, ids.size() - begin);
      decode_rows(ids, inputs, sequences, begin, begin + count, sampled, logits);
    }
  } catch (...) {
    for (Sequence* sequence : sequences) sequence->sampler.truncate(sequence->length);
    throw;
  }
  for (Sequence* sequence : sequences) ++sequence->length;
}

void CpuBackend::decode_rows(std::span<const SequenceId> ids, std::span<const TokenId> inputs,
                             std::span<Sequence* const> sequences, std::size_t begin,
                             std::size_t end, std::span<SampledToken> sampled,
                             std::span<float> logits) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  std::vector<Segment> segments;
  for (std::size_t b = begin; b < end; ++b) {
    segments.push_back({inputs.subspan(b, 1),
                        sequences[b]->length,
                        sequences[b]->pages,
                        sequences[b]->interventions.get(),
                        {}});
    sequences[b]->sampler.append(inputs.subspan(b, 1));
  }
  transformer_.run(segments);
  if (sampled.empty() && logits.empty()) return;
  for (std::size_t row = begin; row < end; row += kLogitRows) {
    const std::size_t count = std::min<std::size_t>(kLogitRows, end - row);
    float* out = logits.empty() ? logit_rows(count) : logits.data() + row * vocab;
    std::vector<std::int64_t> rows(count);
    std::iota(rows.begin(), rows.end(), static_cast<std::int64_t>(row - begin));
    transformer_.logits(rows, out);
    threads_.run(static_cast<std::int64_t>(count), [&](std::int64_t i, int) {
      const std::size_t b = row + static_cast<std::size_t>(i);
      const std::span<const float> one(out + static_cast<std::size_t>(i) * vocab, vocab);
      require_finite(one, sequences[b]->length, ids[b]);
      if (!sampled.empty()) sampled[b] = sequences[b]->sampler.sample(one);
    });
  }
}

void CpuBackend::verify(std::span<Proposal> batch) {
  const std::vector<Sequence*> sequences = sequences_.find_batch(batch);
  std::vector<std::int64_t> lengths;
  for (std::size_t b = 0; b < batch.size(); ++b) {
    lengths.push_back(sequences[b]->length);
    grow(*sequences[b], sequences[b]->length + std::ssize(batch[b].tokens));
  }
  try {
    for_each_rows(batch, static_cast<std::size_t>(info_.verify_rows),
                  [&](std::size_t first, std::size_t last) {
                    verify_rows(batch.subspan(first, last - first),
                                std::span(sequences).subspan(first, last - first));
                  });
  } catch (...) {
    for (std::size_t b = 0; b < batch.size(); ++b) sequences[b]->truncate(lengths[b]);
    throw;
  }
}

void CpuBackend::verify_rows(std::span<Proposal> batch, std::span<Sequence* const> sequences) {
  std::vector<Segment> segments;
  std::vector<std::size_t> first_row;
  std::size_t rows = 0;
  for (std::size_t b = 0; b < batch.size(); ++b) {
    segments.push_back({batch[b].tokens,
                        sequences[b]->length,
                        sequences[b]->pages,
                        sequences[b]->interventions.get(),
                        {}});
    first_row.push_back(rows);
    rows += batch[b].tokens.size();
  }
  transformer_.run(segments);
  float* const logits = logit_rows(rows);
  std::vector<std::int64_t> all_rows(rows);
  std::iota(all_rows.begin(), all_rows.end(), 0);
  transformer_.logits(all_rows, logits);
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  threads_.run(std::ssize(batch), [&](std::int64_t i, int) {
    const auto b = static_cast<std::size_t>(i);
    choose_run(*sequences[b], batch[b], [&](std::size_t row) {
      const std::span<const float> one(logits + (first_row[b] + row) * vocab, vocab);
      require_finite(one, sequences[b]->length - 1, batch[b].sequence);
      return sequences[b]->sampler.sample(one);
    });
  });
}

double CpuBackend::measure_read_ceiling() {
  struct Piece {
    const std::byte* data;
    std::int64_t bytes;
  };
  std::vector<Piece> pieces;
  std::int64_t total = 0;
  for_each_decoded_tensor(model_->weights(), [&](const DLTensor& tensor) {
    const std::int64_t bytes = num_bytes(tensor);
    total += bytes;
    for (std::int64_t at = 0; at < bytes; at += kReadTaskBytes) {
      pieces.push_back({data_of(tensor) + at, std::min(kReadTaskBytes, bytes - at)});
    }
  });
  double best = 0;
  std::atomic<std::uint64_t> checksum = 0;
  for (int pass = 0; pass < kCeilingPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    threads_.run(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, int) {
      const Piece& piece = pieces[static_cast<std::size_t>(i)];
      checksum.fetch_xor(read_memory(piece.data, piece.bytes), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(total) / seconds.count());
  }
  return best;
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(std::shared_ptr<const Model> model,
                                          const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(std::move(model), options);
}

}  // namespace clusterfusion
