#include "cli/score_pairs.hpp"

#include <fmt/format.h>

#include <vector>

#include "base/fail.hpp"
#include "cli/interrupt.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/text_pairs.hpp"

namespace clusterfusion::cli {
namespace {

LoglikelihoodRequest encode_pair(const Engine& engine, const TextPair& pair) {
  const std::int64_t longest = engine.info().max_positions + 1;
  try {
    LoglikelihoodRequest request = engine.encode_pair(pair.context, pair.continuation);
    const std::int64_t length = std::ssize(request.context) + std::ssize(request.continuation);
    require(length <= longest, ErrorKind::invalid_argument,
            "the pair has {} tokens, and a context of {} positions scores at most {}; shorten the "
            "context",
            length, longest - 1, longest);
    return request;
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::invalid_argument) throw;
    fail(ErrorKind::malformed, "{}: {}", pair.where, error.what());  // as other wrong lines
  }
}

std::vector<LoglikelihoodResult> score(Engine& engine,
                                       const std::vector<LoglikelihoodRequest>& requests,
                                       std::int32_t num_top, bool quiet) {
  const InterruptScope interrupt;
  ProgressBar progress("score", "pairs", quiet);
  LoglikelihoodOptions options{.num_top = num_top};
  std::int64_t pairs_done = 0;
  options.progress = [&](std::int64_t done, std::int64_t total) {
    pairs_done = done;
    progress.update(done, total);
    return true;
  };
  try {
    return engine.loglikelihood(requests, options);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::interrupted) throw;
    fail(error.kind(), "interrupted after {} of {} pairs; no result", pairs_done, requests.size());
  }
}

void print_table(const std::vector<LoglikelihoodResult>& results) {
  write_output(fmt::format("{:>6} {:>8} {:>14}  {}\n", "index", "tokens", "logprob", "greedy"));
  double total = 0;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < results.size(); ++i) {
    const LoglikelihoodResult& result = results[i];
    write_output(fmt::format("{:>6} {:>8} {:>14.5f}  {}\n", i, result.tokens.size(), result.total,
                             result.is_greedy ? "yes" : "no"));
    total += result.total;
    tokens += std::ssize(result.tokens);
  }
  write_output(fmt::format("total log-probability {:.5f} nats over {} in {}\n", total,
                           format_count(tokens, "scored token"),
                           format_count(std::ssize(results), "pair")));
}

}  // namespace

void score_pairs(Engine& engine, const std::string& text, const std::string& source,
                 std::int32_t num_top, const ReportSettings& report) {
  std::vector<LoglikelihoodRequest> requests;
  for (const TextPair& pair : parse_text_pairs(text, source)) {
    requests.push_back(encode_pair(engine, pair));
  }
  const std::vector<LoglikelihoodResult> results = score(engine, requests, num_top, report.quiet);
  if (!report.json) return print_table(results);
  for (const LoglikelihoodResult& result : results) {
    write_output(to_line(to_json(result, engine.tokenizer())));
  }
}

}  // namespace clusterfusion::cli
