// Tokens that a sequence may come to choose, for Backend::verify().
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/error.hpp"
#include "clusterfusion/model.hpp"
#include "clusterfusion/sampling.hpp"

namespace clusterfusion {

class Backend;
using SequenceId = std::int32_t;

struct Proposal {
  SequenceId sequence = -1;
  std::vector<TokenId> tokens;  // the next to append, at least, and behind it what is proposed
  // chosen[i] is the sequence's own choice behind tokens[i]. All but the last are what was
  // proposed: tokens[1], tokens[2], ...
  std::vector<SampledToken> chosen = {};

  // Whether the sequence, having chosen the last of `chosen`, goes on with the tokens.
  bool goes_on() const noexcept {
    return chosen.size() < tokens.size() &&
           (chosen.empty() || chosen.back().token == tokens[chosen.size()]);
  }
};

// Backend::verify() by decode(): as many steps as the longest run has. For devices whose step has
// one row of a sequence.
void verify_by_steps(Backend& backend, std::span<Proposal> batch);

// Whether an error is about the numbers or options of one sequence, and not about the device.
bool concerns_one_sequence(ErrorKind kind) noexcept;

}  // namespace clusterfusion
