// News of many generations by one call: what a server's event loop needs.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "clusterfusion/engine.hpp"

namespace clusterfusion {

// No call waits for the scheduler, but for the destructor. May be called from several threads.
class GenerationFeed {
 public:
  using Key = std::int64_t;

  // News of one generation.
  struct News {
    Key key = 0;
    std::vector<GenerateEvent> events;             // in their order; empty if they are not wanted
    bool has_ended = false;                        // no more news of this key will come
    std::shared_ptr<const Generation> generation;  // for its results
    std::exception_ptr error;                      // why it has ended, if not by itself
  };

  // `wake` is called, perhaps on the scheduler's thread, when there is something to take(); once
  // until the next take(). It must return at once and may not call the feed.
  // Keep the engine alive as long as the feed.
  GenerationFeed(Engine& engine, std::function<void()> wake);
  // Cancels what runs and waits until it is gone.
  ~GenerationFeed();
  GenerationFeed(const GenerationFeed&) = delete;
  GenerationFeed& operator=(const GenerationFeed&) = delete;

  // Engine::start(). Without `wants_events` the only news is the end, with the results.
  // Errors: those of Engine::start().
  Key start(std::vector<GenerateRequest> requests, bool wants_events);
  // Its last events, or its end, come soon, as after Generation::cancel(). A key that has ended is
  // no error.
  void cancel(Key key) noexcept;
  // What there is now, by the time of its coming.
  std::vector<News> take();
  // Scores of a prompt that are there so far: all of them from the sequence's first token on.
  // Nothing for a key that has ended.
  std::vector<ScoredToken> prompt_scores(Key key, std::size_t index) const;

 private:
  struct Shared;
  const std::shared_ptr<Shared> shared_;
  Engine& engine_;
};

}  // namespace clusterfusion
