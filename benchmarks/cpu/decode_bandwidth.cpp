// How close decoding on the CPU comes to reading the weights, and how long a prefill takes. Two
// reads stand beside it: a plain one, where each thread runs straight through memory, and the
// backend's own ceiling, the fastest way of reading that we know (several streams with prefetch).
// Rounds of plain read, prefill and decode take turns, so that what else the machine does meets all
// of them; medians and quartiles go to stdout as JSON.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "backend/backend.hpp"
#include "base/tensor_view.hpp"
#include "base/thread_pool.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

struct Arguments {
  std::string model;
  int threads = 0;
  int rounds = 5;
  int steps = 16;
  int prompt = 512;
  int context = 16;
  int batch = 1;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Median and quartiles.
nlohmann::json summary(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {{"median", at(0.5)},
          {"quartile_1", at(0.25)},
          {"quartile_3", at(0.75)},
          {"smallest", values[0]},
          {"count", values.size()}};
}

std::vector<TokenId> prompt_of(std::int64_t count, std::int64_t vocab) {
  std::vector<TokenId> tokens(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<TokenId>(i * 7919 % static_cast<std::size_t>(vocab));
  }
  return tokens;
}

double time_prefill(Backend& backend, std::span<const TokenId> prompt, std::span<float> logits) {
  const SequenceId id = backend.create_sequence({});
  backend.reserve(id, static_cast<std::int64_t>(prompt.size()));
  const auto start = std::chrono::steady_clock::now();
  PrefillOutput output;
  output.last_logits = logits;
  backend.prefill(id, prompt, output);
  const double seconds = seconds_since(start);
  backend.release_sequence(id);
  return seconds;
}

// Seconds of each greedy step of a batch that starts behind `context` positions; `between` runs
// after each.
template <typename F>
std::vector<double> time_decode(Backend& backend, const Arguments& arguments,
                                std::span<const TokenId> context, F between) {
  std::vector<double> seconds;
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs(static_cast<std::size_t>(arguments.batch), 1);
  std::vector<SampledToken> sampled(inputs.size());
  for (int b = 0; b < arguments.batch; ++b) {
    ids.push_back(backend.create_sequence({}));
    backend.prefill(ids.back(), context, {});
  }
  for (int step = 0; step < arguments.steps; ++step) {
    const auto start = std::chrono::steady_clock::now();
    backend.decode(ids, inputs, 1, sampled, {});
    seconds.push_back(seconds_since(start));
    for (std::size_t b = 0; b < inputs.size(); ++b) inputs[b] = sampled[b].token;
    between();
  }
  for (const SequenceId id : ids) backend.release_sequence(id);
  return seconds;
}

// Bytes per second of a straight multi-threaded read of all layers' matrices and the LM head.
class PlainRead {
 public:
  PlainRead(const Model& model, int threads) : threads_(threads) {
    const ModelWeights& weights = model.weights();
    add(weights.lm_head);
    for (const LayerWeights& w : weights.layers) {
      for (const DLTensor& tensor : w.tensors) {
        if (tensor.ndim == 2) add(tensor);
      }
    }
  }

  double measure() {
    const auto start = std::chrono::steady_clock::now();
    threads_.run(static_cast<std::int64_t>(pieces_.size()), [&](std::int64_t i, int) {
      std::uint64_t sum[8] = {};
      for (const std::uint64_t* at = pieces_[static_cast<std::size_t>(i)].data();
           at < pieces_[static_cast<std::size_t>(i)].data() + kPieceWords; at += 8) {
        for (int lane = 0; lane < 8; ++lane) sum[lane] ^= at[lane];
      }
      for (const std::uint64_t lane : sum) checksum_.fetch_xor(lane);
    });
    return static_cast<double>(pieces_.size()) * kPieceWords * 8 / seconds_since(start);
  }

 private:
  static constexpr std::int64_t kPieceWords = (1 << 20) / 8;
  using Piece = std::span<const std::uint64_t>;

  void add(const DLTensor& matrix) {
    const auto* words = reinterpret_cast<const std::uint64_t*>(data_of(matrix));
    for (std::int64_t at = 0; at + kPieceWords <= num_bytes(matrix) / 8; at += kPieceWords) {
      pieces_.emplace_back(words + at, kPieceWords);
    }
  }

  ThreadPool threads_;
  std::vector<Piece> pieces_;
  std::atomic<std::uint64_t> checksum_ = 0;
};

double middle_of(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

nlohmann::json measure(const Arguments& arguments) {
  const std::shared_ptr<const Model> model =
      arguments.model.empty() ? test::make_random_model(test::pythia_410m_config())
                              : Model::open(arguments.model);
  BackendOptions options;
  options.threads = arguments.threads;
  const auto backend = make_cpu_backend(model, options);
  const std::int64_t vocab = model->config().vocab_size;
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  const auto prompt = prompt_of(arguments.prompt, vocab);
  const auto context = prompt_of(arguments.context, vocab);

  PlainRead plain_read(*model, arguments.threads > 0 ? arguments.threads : usable_cores());

  std::vector<double> plain, ceiling, prefill, decode, share_of_plain, share_of_ceiling;
  backend->measure_read_ceiling();  // brings the weights into memory
  time_prefill(*backend, prompt, logits);
  const auto bytes = static_cast<double>(model->bytes_per_token());
  for (int round = 0; round < arguments.rounds; ++round) {
    // Steps and plain reads alternate one by one: what disturbs the machine disturbs both alike.
    std::vector<double> reads;
    const std::vector<double> steps =
        time_decode(*backend, arguments, context, [&] { reads.push_back(plain_read.measure()); });
    ceiling.push_back(backend->measure_read_ceiling());
    prefill.push_back(time_prefill(*backend, prompt, logits));
    share_of_plain.push_back(bytes / middle_of(steps) / middle_of(reads));
    share_of_ceiling.push_back(bytes / middle_of(steps) / ceiling.back());
    plain.insert(plain.end(), reads.begin(), reads.end());
    decode.insert(decode.end(), steps.begin(), steps.end());
  }
  return {{"device", backend->info().device},
          {"model", arguments.model.empty() ? "random pythia-410m" : arguments.model},
          {"dtype", name_of(model->config().dtype)},
          {"batch", arguments.batch},
          {"context", arguments.context},
          {"prompt_tokens", arguments.prompt},
          {"bytes_per_token", model->bytes_per_token()},
          {"plain_read_bytes_per_second", summary(plain)},
          {"read_ceiling_bytes_per_second", summary(ceiling)},
          {"decode_seconds", summary(decode)},
          {"decode_share_of_plain_read", summary(share_of_plain)},
          {"decode_share_of_read_ceiling", summary(share_of_ceiling)},
          {"prefill_seconds", summary(prefill)}};
}

}  // namespace
}  // namespace clusterfusion

int main(int argc, char** argv) {
  clusterfusion::Arguments arguments;
  CLI::App app("Measures decode and prefill of the CPU backend against a plain read.");
  app.add_option("--model", arguments.model,
                 "checkpoint folder; without it a random fp16 model of pythia-410m's shape");
  app.add_option("--threads", arguments.threads, "0: one for each usable core");
  app.add_option("--rounds", arguments.rounds)->check(CLI::PositiveNumber);
  app.add_option("--steps", arguments.steps, "decode steps a round")->check(CLI::PositiveNumber);
  app.add_option("--prompt", arguments.prompt, "tokens of the prefill")->check(CLI::PositiveNumber);
  app.add_option("--context", arguments.context, "positions before the first decode step")
      ->check(CLI::PositiveNumber);
  app.add_option("--batch", arguments.batch, "sequences")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << clusterfusion::measure(arguments).dump(2) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "decode_bandwidth: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
