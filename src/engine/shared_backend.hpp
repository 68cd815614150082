// A backend that several threads use in turns, and sequences that free themselves.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "backend/backend.hpp"
#include "clusterfusion/error.hpp"
#include "engine/intervention_state.hpp"
#include "engine/turn_mutex.hpp"
#include "model/intact.hpp"

namespace clusterfusion {

class SharedBackend {
 public:
  // `interrupted` is EngineOptions::interrupted; it may be empty.
  SharedBackend(std::shared_ptr<const Model> model, std::unique_ptr<Backend> backend,
                StopRequest interrupted = {});

  const Model& model() const noexcept { return *model_; }
  const BackendInfo& info() const noexcept { return backend_->info(); }

  // Calls `step(Backend&)` while no other step runs. The backend gives up in the middle of it, with
  // Stopped, if `stop` says so.
  // Errors: those of the step; a non_finite one is told where in the checkpoint the value is;
  // interrupted if the engine's caller says so; io if the checkpoint's files became shorter.
  template <typename Step>
  auto run(Step&& step, const StopRequest& stop = {}) {
    try {
      const std::lock_guard lock(turn_);
      const StopScope scope(*this, stop);
      if constexpr (std::is_void_v<std::invoke_result_t<Step, Backend&>>) {
        std::forward<Step>(step)(*backend_);
        require_intact(*model_);
      } else {
        auto result = std::forward<Step>(step)(*backend_);
        require_intact(*model_);
        return result;
      }
    } catch (const Stopped&) {
      if (stop && stop()) throw;
      fail_interrupted();
    } catch (const Error& error) {
      require_intact(*model_);
      if (error.kind() == ErrorKind::non_finite) explain_non_finite(error);
      throw;
    }
  }

  // What sequences that begin now are steered by.
  InterventionState& interventions() noexcept { return interventions_; }
  // The same for a thread that is not the caller's: the engine's caller is not asked, an error is
  // not told more (see explained()), and Stopped comes out if `stop` says so.
  template <typename Step>
  void run_unasked(Step&& step, const StopRequest& stop = {}) {
    const std::lock_guard lock(turn_);
    const StopScope scope(*this, stop, /*asks_caller=*/false);
    std::forward<Step>(step)(*backend_);
    require_intact(*model_);
  }
  // An error of a step, told where in the checkpoint its cause is.
  std::exception_ptr explained(const Error& error) const;
  // Whether the engine's caller wants its calls to end. Asks on the thread that it is called on.
  bool ask_interrupted() const { return interrupted_ && interrupted_(); }
  [[noreturn]] static void fail_interrupted();

  // Measured at the first call and remembered.
  double measure_read_ceiling();
  // 0 before measure_read_ceiling().
  double known_read_ceiling() const noexcept { return read_ceiling_; }

 private:
  // The backend asks `stop` and the engine's caller as long as this lives.
  class StopScope {
   public:
    StopScope(SharedBackend& shared, const StopRequest& stop, bool asks_caller = true);
    ~StopScope() { backend_.set_stop_request({}); }
    StopScope(const StopScope&) = delete;
    StopScope& operator=(const StopScope&) = delete;

   private:
    Backend& backend_;
  };

  bool is_interrupted();
  [[noreturn]] void explain_non_finite(const Error& error) const;

  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
  TurnMutex turn_;
  InterventionState interventions_;
  StopRequest interrupted_;
  std::chrono::steady_clock::time_point next_question_;  // of interrupted_
  std::once_flag measured_;
  std::atomic<double> read_ceiling_ = 0;
};

// A sequence of a backend, released with the handle.
class SequenceHandle {
 public:
  // A new sequence that may grow to `positions` without further allocation. Calls with several
  // sequences pass the interventions that held when they began; without, it is those of now.
  // Errors: those of Backend::create_sequence(), intervene() and reserve().
  SequenceHandle(SharedBackend& backend, const SamplingParams& sampling, std::int64_t positions,
                 std::shared_ptr<const Interventions> interventions);
  SequenceHandle(SharedBackend& backend, const SamplingParams& sampling, std::int64_t positions)
      : SequenceHandle(backend, sampling, positions, backend.interventions().now()) {}
  ~SequenceHandle();
  SequenceHandle(const SequenceHandle&) = delete;
  SequenceHandle& operator=(const SequenceHandle&) = delete;

  SequenceId id() const noexcept { return id_; }

 private:
  SharedBackend& backend_;
  SequenceId id_;
};

}  // namespace clusterfusion
