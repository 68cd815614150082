#include "engine/step_costs.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace clusterfusion {

// A step tells of the machine's mood, which all numbers of rows share, and of its own number.
void StepCosts::note(std::int32_t rows, double seconds) {
  constexpr double kWeight = 0.1;
  constexpr double kMostSurprise = 2;  // a step that something else has held up counts for less
  const auto [entry, is_new] = known_.try_emplace(rows, seconds);
  if (is_new || seconds <= 0) return;
  const double surprise = std::clamp(seconds / entry->second, 1 / kMostSurprise, kMostSurprise);
  const double factor = std::pow(surprise, kWeight);
  for (auto& [others, known] : known_) known *= factor;
  entry->second *= factor;
}

double StepCosts::seconds(std::int32_t rows) const {
  if (known_.empty()) return 0;
  const auto above = known_.lower_bound(rows);
  if (above == known_.end()) {
    const auto& [most, known] = *known_.rbegin();
    return known * rows / most;
  }
  if (above->first == rows || above == known_.begin()) return above->second;
  const auto below = std::prev(above);
  const double share = static_cast<double>(rows - below->first) / (above->first - below->first);
  return below->second + share * (above->second - below->second);
}

}  // namespace clusterfusion
