#include "engine/shared_backend.hpp"

#include <optional>
#include <string>

#include "base/fail.hpp"

namespace clusterfusion {

namespace {

// Asking may cost something (in Python the interpreter's lock).
constexpr std::chrono::milliseconds kBetweenQuestions{20};

}  // namespace

SharedBackend::SharedBackend(std::shared_ptr<const Model> model, std::unique_ptr<Backend> backend,
                             StopRequest interrupted)
    : model_(std::move(model)),
      backend_(std::move(backend)),
      interrupted_(std::move(interrupted)) {}

SharedBackend::StopScope::StopScope(SharedBackend& shared, const StopRequest& stop,
                                    bool asks_caller)
    : backend_(*shared.backend_) {
  if (!asks_caller) {
    backend_.set_stop_request(stop);
    return;
  }
  if (!shared.interrupted_ && !stop) return;
  // Short steps and devices that do not ask leave it to this.
  if (shared.is_interrupted()) fail_interrupted();
  backend_.set_stop_request(
      [&shared, &stop] { return (stop && stop()) || shared.is_interrupted(); });
}

bool SharedBackend::is_interrupted() {
  if (!interrupted_) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_question_) return false;
  next_question_ = now + kBetweenQuestions;
  return interrupted_();
}

void SharedBackend::fail_interrupted() {
  fail(ErrorKind::interrupted, "interrupted by the caller before the result was there");
}

double SharedBackend::measure_read_ceiling() {
  std::call_once(measured_, [this] {
    read_ceiling_ = run([](Backend& backend) { return backend.measure_read_ceiling(); });
  });
  return read_ceiling_;
}

std::exception_ptr SharedBackend::explained(const Error& error) const {
  try {
    require_intact(*model_);
    if (error.kind() == ErrorKind::non_finite) explain_non_finite(error);
  } catch (...) {
    return std::current_exception();
  }
  return std::make_exception_ptr(error);
}

void SharedBackend::explain_non_finite(const Error& error) const {
  if (const std::optional<std::string> finding = model_->find_non_finite()) {
    fail(ErrorKind::non_finite, "{}; the checkpoint is damaged: {}; fetch or convert it again",
         error.what(), *finding);
  }
  fail(ErrorKind::non_finite,
       "{}; every weight of {} is finite, so the values overflow on their way through the layers: "
       "check config.json against the checkpoint's source",
       error.what(), model_->folder().string());
}

SequenceHandle::SequenceHandle(SharedBackend& backend, const SamplingParams& sampling,
                               std::int64_t positions,
                               std::shared_ptr<const Interventions> interventions)
    : backend_(backend), id_(backend.run([&](Backend& device) {
        const SequenceId id = device.create_sequence(sampling);
        try {
          device.intervene(id, std::move(interventions));
          device.reserve(id, positions);
        } catch (...) {
          device.release_sequence(id);
          throw;
        }
        return id;
      })) {}

SequenceHandle::~SequenceHandle() {
  try {
    // Also for a caller that was interrupted.
    backend_.run_unasked([this](Backend& device) { device.release_sequence(id_); });
  } catch (...) {
    // A sequence that cannot be released stays with the backend, which goes with the engine.
  }
}

}  // namespace clusterfusion
