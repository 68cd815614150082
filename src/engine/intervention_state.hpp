// What Engine::steer() and ablate() have asked for, as the devices take it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "backend/interventions.hpp"
#include "clusterfusion/interventions.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion {

// For several threads.
class InterventionState {
 public:
  // These have the meaning and errors of their namesakes in Engine.
  void steer(const ModelConfig& config, std::vector<SteeringVector> vectors, float scale);
  void ablate(const ModelConfig& config, const Ablation& ablation);

  // Of a request that begins now; null where nothing is asked for.
  std::shared_ptr<const Interventions> now() const;

 private:
  // From a copy of what holds now, changed.
  template <typename Change>
  void replace(const ModelConfig& config, Change change);

  mutable std::mutex mutex_;
  std::shared_ptr<const Interventions> now_;
};

}  // namespace clusterfusion
