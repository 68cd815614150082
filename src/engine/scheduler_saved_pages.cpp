// Pages of the prefix cache that are saved to files and come from there.
#include "base/fail.hpp"
#include "engine/scheduler.hpp"

namespace clusterfusion {

PrefixCache::Chain Scheduler::pin_pages(std::span<const TokenId> tokens) {
  return backend_->run(
      [&](Backend&) { return cache_.find(tokens, std::ssize(tokens) / kKvPagePositions); });
}

void Scheduler::unpin_pages(const PrefixCache::Chain& chain) {
  backend_->run_unasked([&](Backend&) { cache_.unpin(chain); });
}

void Scheduler::read_page(const PrefixCache::Entry& entry, std::span<std::byte> content) {
  backend_->run([&](Backend& backend) { backend.read_page(PrefixCache::page_of(entry), content); });
}

void Scheduler::add_page(PrefixCache::Chain& chain, std::span<const TokenId> tokens,
                         std::span<const std::byte> content) {
  backend_->run([&](Backend& backend) {
    if (cache_.extend(chain, tokens)) return;
    while (free_pages(backend) < 1 && evict(backend)) {
    }
    require(free_pages(backend) >= 1, ErrorKind::out_of_memory,
            "the KV cache has {} pages of {} positions, and {} of them are in use: there is no "
            "room for page {} of a saved prompt; raise kv_bytes, or load it while less runs",
            info().kv_pages, kKvPagePositions, backend.kv_pages_in_use(), chain.size());
    cache_.add(chain, tokens, backend.add_page(content));
  });
}

}  // namespace clusterfusion
