// An engine from its parts.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.hpp"
#include "clusterfusion/engine.hpp"
#include "engine/scheduler.hpp"

namespace clusterfusion {

// `tokenizer` may be null; `device_reason` is EngineInfo's, `interrupted` EngineOptions'.
// Where the tokenizer has ids that the model does not, there is a warning, and an error where one
// is used. (A model may have more: the vocabularies of Pythia are padded.)
std::unique_ptr<Engine> make_engine(std::shared_ptr<const Model> model,
                                    std::shared_ptr<const Tokenizer> tokenizer,
                                    std::unique_ptr<Backend> backend, std::string device_reason,
                                    StopRequest interrupted = {}, SchedulerOptions scheduling = {});

}  // namespace clusterfusion
