// Prompts whose keys and values are saved to files and loaded again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <span>
#include <string>

#include "engine/prompt_cache_file.hpp"
#include "engine/scheduler.hpp"

namespace clusterfusion {

// Of one engine. From any thread. What is saved comes out of the prefix cache, and what is loaded
// goes there, so that texts find it as they find any prefix.
class PromptCache {
 public:
  PromptCache(SharedBackend& backend, Scheduler& scheduler)
      : backend_(backend), scheduler_(scheduler) {}

  // Engine::save_prompt_cache(); `engine` reads the prompt.
  std::int64_t save(Engine& engine, std::span<const TokenId> prompt,
                    const std::filesystem::path& path);
  // Engine::load_prompt_cache().
  std::int64_t load(const std::filesystem::path& path, std::span<const TokenId> prompt);

 private:
  void check_has_cache() const;
  std::int64_t positions_to_save(std::span<const TokenId> prompt) const;
  const PromptCacheIdentity& identity();

  SharedBackend& backend_;
  Scheduler& scheduler_;
  std::once_flag identified_;
  PromptCacheIdentity identity_;
};

}  // namespace clusterfusion
