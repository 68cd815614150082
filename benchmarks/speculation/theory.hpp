// The time of a token with a draft of known quality, beside what it should be.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "backend/backend.hpp"

namespace clusterfusion::benchmark {

struct TheorySettings {
  std::int64_t tokens = 96;  // of the text, which is decoded greedily behind 16
  int rounds = 5;
  double warm_up_seconds = 0;
  std::vector<double> shares = {0.5, 0.7, 0.9};  // of the proposed tokens that are right
  std::vector<int> proposals = {1, 3, 7};        // in each step
  std::function<double()> now;                   // seconds
};

// A draft that knows the text, and says each token right with a given chance, proposes k tokens in
// each step. Theory: the cost of a step of k + 1 rows, all of them right, over the positions of the
// text, divided by the tokens that a step gave. All is measured in turns, by `now`, and figures are
// medians over the rounds. token_seconds is what a caller sees between the first and the last
// token; token_seconds_engine what the engine's statistics say. `make` gives backends of `model`,
// of which there are three at once.
// Errors: internal if a text differs from the one without a draft.
nlohmann::json measure_theory(const std::shared_ptr<const Model>& model,
                              const std::function<std::unique_ptr<Backend>()>& make,
                              const TheorySettings& settings);

double median(std::vector<double> values);

}  // namespace clusterfusion::benchmark
