#include "engine/prompt_cache.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/fail.hpp"
#include "clusterfusion/engine.hpp"
#include "engine/prepare_request.hpp"
#include "io/json.hpp"
#include "model/fingerprint.hpp"

namespace clusterfusion {
namespace {

// Pages that stay in the prefix cache as long as this lives.
class PinnedPages {
 public:
  explicit PinnedPages(Scheduler& scheduler, PrefixCache::Chain chain = {})
      : chain(std::move(chain)), scheduler_(scheduler) {}
  ~PinnedPages() {
    try {
      scheduler_.unpin_pages(chain);
    } catch (...) {
      // A device that fails now fails the next request, which tells.
    }
  }
  PinnedPages(const PinnedPages&) = delete;
  PinnedPages& operator=(const PinnedPages&) = delete;

  PrefixCache::Chain chain;

 private:
  Scheduler& scheduler_;
};

// So that its pages are in the prefix cache.
void read_prompt(Engine& engine, std::span<const TokenId> prompt) {
  GenerateRequest request;
  request.prompt_tokens.assign(prompt.begin(), prompt.end());
  request.max_new_tokens = 1;
  engine.generate(std::move(request));
}

// The prompt begins with all of the saved tokens.
void check_beginning(std::span<const TokenId> saved, std::span<const TokenId> prompt,
                     const std::string& file) {
  constexpr const char* kAdvice =
      "pass a prompt that begins as the saved one, name another file, or delete this one to have "
      "the prompt saved anew";
  const auto [in_file, in_prompt] = std::ranges::mismatch(saved, prompt);
  if (in_file == saved.end()) return;
  const auto index = in_file - saved.begin();
  require(in_prompt != prompt.end(), ErrorKind::invalid_argument,
          "{} has keys and values of {} tokens, and the prompt ends after {} of them; {}", file,
          saved.size(), index, kAdvice);
  fail(ErrorKind::invalid_argument,
       "{} is of another prompt: of its {} tokens, token {} is {}, and the prompt has {} there; {}",
       file, saved.size(), index, *in_file, *in_prompt, kAdvice);
}

}  // namespace

const PromptCacheIdentity& PromptCache::identity() {
  std::call_once(identified_, [this] {
    const Model& model = backend_.model();
    identity_ = {.model = fingerprint_of(model),
                 .model_name = quote(model.folder().string()),
                 .kv_dtype = name_of(backend_.info().kv_dtype),
                 .arithmetic = backend_.info().arithmetic,
                 .version = CLUSTERFUSION_VERSION};
  });
  return identity_;
}

void PromptCache::check_has_cache() const {
  require(scheduler_.has_prefix_cache(), ErrorKind::invalid_argument,
          "a prompt's keys and values are saved from the prefix cache and loaded into it, and this "
          "engine has none: leave prefix_cache on");
}

// Whole pages that other prompts may share, and no more than a prompt with a new token can use.
std::int64_t PromptCache::positions_to_save(std::span<const TokenId> prompt) const {
  const BackendInfo& info = backend_.info();
  check_tokens(prompt, backend_.model().config().vocab_size, "prompt");
  const std::int64_t usable = std::min(std::ssize(prompt), info.max_positions - 1);
  const std::int64_t positions = usable / kKvPagePositions * kKvPagePositions;
  require(positions > 0, ErrorKind::invalid_argument,
          "the prompt has {} tokens, and keys and values are saved of whole pages of {} tokens: "
          "there is nothing to save; such a prompt is read quickly without",
          prompt.size(), kKvPagePositions);
  return positions;
}

std::int64_t PromptCache::save(Engine& engine, std::span<const TokenId> prompt,
                               const std::filesystem::path& path) {
  check_has_cache();
  require(backend_.interventions().now() == nullptr, ErrorKind::invalid_argument,
          "texts are steered or ablated now, and keys and values of such texts are not saved: turn "
          "that off before a prompt is saved");
  const std::int64_t positions = positions_to_save(prompt);
  const auto beginning = prompt.first(static_cast<std::size_t>(positions));
  PromptCacheWriter writer(path);  // what cannot be written is known before the work
  read_prompt(engine, beginning);
  const PinnedPages pages(scheduler_, scheduler_.pin_pages(beginning));
  require(std::ssize(pages.chain) == kv_pages_of(positions), ErrorKind::out_of_memory,
          "of {} pages of the prompt {} had to give way to other texts before they were saved; "
          "raise kv_bytes, or save the prompt while less runs",
          kv_pages_of(positions), kv_pages_of(positions) - std::ssize(pages.chain));
  const std::int64_t page_bytes = backend_.info().page_bytes();
  writer.begin(identity(), beginning, page_bytes);
  std::vector<std::byte> content(static_cast<std::size_t>(page_bytes));
  for (const PrefixCache::Entry* entry : pages.chain) {
    scheduler_.read_page(*entry, content);
    writer.add_page(content);
  }
  writer.commit();
  return positions;
}

std::int64_t PromptCache::load(const std::filesystem::path& path, std::span<const TokenId> prompt) {
  check_has_cache();
  PromptCacheReader reader(path);
  reader.expect(identity(), backend_.info().page_bytes());
  const std::span<const TokenId> saved = reader.tokens();
  if (!prompt.empty()) check_beginning(saved, prompt, quote(path.string()));
  PinnedPages pages(scheduler_);
  for (std::int64_t page = 0; page < reader.num_pages(); ++page) {
    const auto begin = static_cast<std::size_t>(page * kKvPagePositions);
    scheduler_.add_page(pages.chain, saved.subspan(begin, kKvPagePositions), reader.page(page));
  }
  return std::ssize(saved);
}

}  // namespace clusterfusion
