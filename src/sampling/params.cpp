#include <cmath>

#include "base/fail.hpp"
#include "clusterfusion/sampling.hpp"

namespace clusterfusion {
namespace {

// Every comparison with NaN is false, so NaN never counts as `in_range`.
template <typename T>
void check(bool in_range, const char* option, const char* range, T value) {
  require(in_range, ErrorKind::invalid_argument, "{} must be {}, got {}", option, range, value);
}

}  // namespace

void SamplingParams::validate() const {
  check(temperature >= 0 && std::isfinite(temperature), "temperature",
        "a finite number >= 0 (0 is greedy)", temperature);
  check(top_k >= 0, "top_k", ">= 0 (0 keeps all tokens)", top_k);
  check(top_p > 0 && top_p <= 1, "top_p", "in (0, 1] (1 keeps all tokens)", top_p);
  check(min_p >= 0 && min_p <= 1, "min_p", "in [0, 1] (0 keeps all tokens)", min_p);
  check(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty",
        "a finite number > 0 (1 is no penalty)", repetition_penalty);
  check(num_logprobs >= -1 && num_logprobs <= 100, "num_logprobs",
        "in [-1, 100] (-1: none, 0: of the chosen token only)", num_logprobs);
  check(frequency_penalty >= -2 && frequency_penalty <= 2, "frequency_penalty",
        "in [-2, 2] (0 is no penalty)", frequency_penalty);
  check(presence_penalty >= -2 && presence_penalty <= 2, "presence_penalty",
        "in [-2, 2] (0 is no penalty)", presence_penalty);
  check(no_repeat_ngram_size >= 0, "no_repeat_ngram_size", ">= 0 (0 lets all repeat)",
        no_repeat_ngram_size);
  for (const TokenBias& biased : logit_bias) {
    require(biased.bias >= -100 && biased.bias <= 100, ErrorKind::invalid_argument,
            "logit_bias of token {} must be in [-100, 100], got {}", biased.token, biased.bias);
  }
}

}  // namespace clusterfusion
