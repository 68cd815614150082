// What is known of a text and of its draft.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "engine/draft.hpp"

namespace clusterfusion {

// Of proposals that were looked at, how many were right, the last ones counting most.
class Acceptance {
 public:
  Acceptance(double right, double seen) : right_(right), seen_(seen) {}
  Acceptance() = default;

  void note(double right, double seen, double keep) {
    right_ = keep * right_ + right;
    seen_ = keep * seen_ + seen;
  }
  // What is expected before anything is seen counts as `weight` proposals.
  double share(double expected, double weight) const {
    return (right_ + weight * expected) / (seen_ + weight);
  }

 private:
  double right_ = 0, seen_ = 0;
};

// What is known of one text.
struct DraftedText {
  std::unique_ptr<DraftText> draft;
  std::size_t num_told = 0;  // tokens that the draft was told
  bool has_read = false;     // all of them, once: the prompt
  std::array<Acceptance, kCertainties> acceptance{};
  // Seconds lost against plain steps, as far as tokens that have come do not allow for them. Below
  // 0: gained, as far as that is kept in mind.
  double lost = 0;
  std::int64_t num_settled = 0;  // tokens that have done so
};

}  // namespace clusterfusion
