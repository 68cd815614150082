#include "plan/rotary_table.hpp"

#include <algorithm>
#include <numbers>

namespace clusterfusion::plan {
namespace {

constexpr double kTurn = 2 * std::numbers::pi;

// Waves that fit high_freq_factor times into the old context stay, those that do not fit
// low_freq_factor times become longer, those between go from one to the other.
double llama3(double frequency, const RopeScaling& scaling) {
  const double waves = scaling.original_positions * frequency / kTurn;  // in the old context
  if (waves < scaling.low_freq_factor) return frequency / scaling.factor;
  if (waves > scaling.high_freq_factor) return frequency;
  const double kept =
      (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - kept) * frequency / scaling.factor + kept * frequency;
}

// The pair, as a real number, that turns so often within the old context.
double pair_with_turns(double turns, const LayerSpec& spec) {
  const RopeScaling& scaling = spec.rope_scaling;
  return static_cast<double>(spec.rotary_dim) *
         std::log(scaling.original_positions / (turns * kTurn)) / (2 * std::log(spec.rope_theta));
}

// Pairs up to the one that turns beta_fast times stay, those from beta_slow on become slower, those
// between go from one to the other.
void apply_yarn(const LayerSpec& spec, std::vector<double>& frequencies) {
  const RopeScaling& scaling = spec.rope_scaling;
  double first = pair_with_turns(scaling.beta_fast, spec);
  double last = pair_with_turns(scaling.beta_slow, spec);
  if (scaling.truncate) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(spec.rotary_dim - 1));
  if (first == last) last += 0.001;  // as transformers keeps the ramp from dividing by zero
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double slowed = std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
    frequencies[i] *= 1 - slowed + slowed / scaling.factor;
  }
}

}  // namespace

std::vector<double> rotary_frequencies(const LayerSpec& spec) {
  const auto dim = static_cast<double>(spec.rotary_dim);
  std::vector<double> frequencies;
  for (std::int64_t i = 0; i < spec.rotary_dim; i += 2) {
    frequencies.push_back(std::pow(spec.rope_theta, -static_cast<double>(i) / dim));
  }
  switch (spec.rope_scaling.kind) {
    case RopeKind::plain: break;
    case RopeKind::linear:
      for (double& frequency : frequencies) frequency /= spec.rope_scaling.factor;
      break;
    case RopeKind::llama3:
      for (double& frequency : frequencies) frequency = llama3(frequency, spec.rope_scaling);
      break;
    case RopeKind::yarn: apply_yarn(spec, frequencies); break;
  }
  return frequencies;
}

}  // namespace clusterfusion::plan
