#include "clusterfusion/generation_feed.hpp"

#include <mutex>
#include <unordered_map>
#include <utility>

namespace clusterfusion {

// The scheduler's thread knows this alone, and may do so a moment longer than the feed lives.
struct GenerationFeed::Shared {
  struct Entry {
    std::shared_ptr<Generation> generation;
    bool wants_events = false;
  };

  void add(Key key) {
    const std::lock_guard lock(mutex);
    if (ready.empty() && wake) wake();
    ready.push_back(key);
  }

  std::mutex mutex;  // of `ready` and `wake`
  std::vector<Key> ready;
  std::function<void()> wake;  // empty when the feed is gone

  std::mutex entries_mutex;  // of what follows, and of the generations' readers
  std::unordered_map<Key, Entry> entries;
  Key next_key = 1;
};

GenerationFeed::GenerationFeed(Engine& engine, std::function<void()> wake)
    : shared_(std::make_shared<Shared>()), engine_(engine) {
  shared_->wake = std::move(wake);
}

GenerationFeed::~GenerationFeed() {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->wake = {};
  }
  const std::lock_guard lock(shared_->entries_mutex);
  for (const auto& [key, entry] : shared_->entries) entry.generation->cancel();
  shared_->entries.clear();
}

GenerationFeed::Key GenerationFeed::start(std::vector<GenerateRequest> requests,
                                          bool wants_events) {
  Key key = 0;
  {
    const std::lock_guard lock(shared_->entries_mutex);
    key = shared_->next_key++;
  }
  std::shared_ptr<Generation> generation =
      engine_.start(std::move(requests), [shared = std::weak_ptr(shared_), key] {
        if (const auto alive = shared.lock()) alive->add(key);
      });
  {
    const std::lock_guard lock(shared_->entries_mutex);
    shared_->entries.emplace(key, Shared::Entry{std::move(generation), wants_events});
  }
  shared_->add(key);  // what came before the entry was there
  return key;
}

void GenerationFeed::cancel(Key key) noexcept {
  const std::lock_guard lock(shared_->entries_mutex);
  const auto found = shared_->entries.find(key);
  if (found != shared_->entries.end()) found->second.generation->cancel();
}

std::vector<GenerationFeed::News> GenerationFeed::take() {
  std::vector<Key> ready;
  {
    const std::lock_guard lock(shared_->mutex);
    ready.swap(shared_->ready);
  }
  std::vector<News> all;
  const std::lock_guard lock(shared_->entries_mutex);
  for (const Key key : ready) {
    const auto found = shared_->entries.find(key);
    if (found == shared_->entries.end()) continue;
    Shared::Entry& entry = found->second;
    News news{.key = key, .events = {}, .has_ended = false, .generation = {}, .error = {}};
    try {
      news.events = entry.generation->take();
      if (!entry.wants_events) news.events.clear();
      news.has_ended = entry.generation->has_ended();
    } catch (...) {
      news.has_ended = true;
      news.error = std::current_exception();
    }
    news.generation = entry.generation;
    if (news.has_ended) shared_->entries.erase(found);
    if (news.has_ended || !news.events.empty()) all.push_back(std::move(news));
  }
  return all;
}

std::vector<ScoredToken> GenerationFeed::prompt_scores(Key key, std::size_t index) const {
  const std::lock_guard lock(shared_->entries_mutex);
  const auto found = shared_->entries.find(key);
  if (found == shared_->entries.end()) return {};
  return found->second.generation->results().at(index).prompt_scores;
}

}  // namespace clusterfusion
