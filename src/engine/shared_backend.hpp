// A backend that several threads use in turns, and sequences that free themselves.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "backend/backend.hpp"
#include "clusterfusion/error.hpp"
#include "engine/turn_mutex.hpp"

namespace clusterfusion {

class SharedBackend {
 public:
  SharedBackend(std::shared_ptr<const Model> model, std::unique_ptr<Backend> backend);

  const Model& model() const noexcept { return *model_; }
  const BackendInfo& info() const noexcept { return backend_->info(); }

  // Calls `step(Backend&)` while no other step runs.
  // Errors: those of the step; a non_finite one is told where in the checkpoint the value is.
  template <typename Step>
  auto run(Step&& step) {
    try {
      const std::lock_guard lock(turn_);
      return std::forward<Step>(step)(*backend_);
    } catch (const Error& error) {
      if (error.kind() == ErrorKind::non_finite) explain_non_finite(error);
      throw;
    }
  }

  // Measured at the first call and remembered.
  double measure_read_ceiling();
  // 0 before measure_read_ceiling().
  double known_read_ceiling() const noexcept { return read_ceiling_; }

 private:
  [[noreturn]] void explain_non_finite(const Error& error) const;

  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
  TurnMutex turn_;
  std::once_flag measured_;
  std::atomic<double> read_ceiling_ = 0;
};

// A sequence of a backend, released with the handle.
class SequenceHandle {
 public:
  // A new sequence that may grow to `positions` without further allocation.
  // Errors: those of Backend::create_sequence() and reserve().
  SequenceHandle(SharedBackend& backend, const SamplingParams& sampling, std::int64_t positions);
  ~SequenceHandle();
  SequenceHandle(const SequenceHandle&) = delete;
  SequenceHandle& operator=(const SequenceHandle&) = delete;

  SequenceId id() const noexcept { return id_; }

 private:
  SharedBackend& backend_;
  SequenceId id_;
};

}  // namespace clusterfusion
