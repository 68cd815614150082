// News of all generations of a server in one crossing: events as columns, results at the end.
#include <sys/eventfd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "clusterfusion/generation_feed.hpp"
#include "convert.hpp"
#include "export.hpp"
#include "objects.hpp"

namespace clusterfusion::python {
namespace {

// Tokens with log-probabilities: (tokens, their log-probabilities, where each one's most likely
// tokens end, all these tokens, their log-probabilities).
class TokenColumns {
 public:
  template <typename Token>
  void add(const Token& token) {
    tokens_.push_back(token.token);
    logprobs_.push_back(token.logprob);
    for (const TokenLogprob& likely : token.top) {
      top_tokens_.push_back(likely.token);
      top_logprobs_.push_back(likely.logprob);
    }
    top_ends_.push_back(static_cast<std::int64_t>(top_tokens_.size()));
  }
  ffi::Array<ffi::Tensor> take() {
    return {to_tensor(std::move(tokens_)), to_tensor(std::move(logprobs_)),
            to_tensor(std::move(top_ends_)), to_tensor(std::move(top_tokens_)),
            to_tensor(std::move(top_logprobs_))};
  }

 private:
  std::vector<TokenId> tokens_;
  std::vector<float> logprobs_;
  std::vector<std::int64_t> top_ends_;
  std::vector<TokenId> top_tokens_;
  std::vector<float> top_logprobs_;
};

template <typename Tokens>
ffi::Array<ffi::Tensor> columns_of(const Tokens& tokens) {
  TokenColumns columns;
  for (const auto& token : tokens) columns.add(token);
  return columns.take();
}

// (keys, indices, finish reasons or -1, where texts end, all texts, TokenColumns); no token is -1.
class EventColumns {
 public:
  void add(GenerationFeed::Key key, const GenerateEvent& event) {
    keys_.push_back(key);
    indices_.push_back(static_cast<std::int32_t>(event.index));
    reasons_.push_back(event.finish_reason ? static_cast<std::int32_t>(*event.finish_reason) : -1);
    texts_ += event.text;
    text_ends_.push_back(static_cast<std::int64_t>(texts_.size()));
    tokens_.add(event.token ? *event.token : SampledToken{});
  }
  ffi::Array<ffi::Any> take() {
    return {to_tensor(std::move(keys_)),    to_tensor(std::move(indices_)),
            to_tensor(std::move(reasons_)), to_tensor(std::move(text_ends_)),
            ffi::Bytes(std::move(texts_)),  tokens_.take()};
  }

 private:
  std::vector<std::int64_t> keys_;
  std::vector<std::int32_t> indices_;
  std::vector<std::int32_t> reasons_;
  std::vector<std::int64_t> text_ends_;
  std::string texts_;
  TokenColumns tokens_;
};

Fields to_fields(const GenerateResult& result) {
  ffi::Any reason;
  if (result.finish_reason) reason = static_cast<std::int64_t>(*result.finish_reason);
  return {
      {"text", ffi::String(result.text)},
      {"prompt_tokens", to_tensor(result.prompt_tokens)},
      {"tokens", to_tensor(result.tokens)},
      {"sampled", columns_of(result.sampled)},
      {"prompt_scores", columns_of(result.prompt_scores)},
      {"finish_reason", reason},
      {"statistics", to_ffi(result.statistics)},
  };
}

// (name of the Python exception, message)
ffi::Array<ffi::String> described(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    return {ffi::String(python_exception_name(known.kind())), ffi::String(known.what())};
  } catch (const std::bad_alloc&) {
    return {ffi::String("MemoryError"), ffi::String("out of host memory")};
  } catch (const std::exception& other) {
    return {ffi::String("RuntimeError"), ffi::String(other.what())};
  }
}

// `event_fd` becomes readable when there is something to take.
FeedRef feed_open(EngineRef engine, std::int64_t event_fd) {
  return FeedRef(ffi::make_object<FeedObj>(
      engine, [fd = static_cast<int>(event_fd)] { ::eventfd_write(fd, 1); }));
}

std::int64_t feed_start(FeedRef feed, ffi::Array<Fields> requests, bool wants_events) {
  std::vector<GenerateRequest> converted;
  for (const Fields& request : requests) converted.push_back(to_request(request));
  return feed->feed.start(std::move(converted), wants_events);
}

void feed_cancel(FeedRef feed, std::int64_t key) { feed->feed.cancel(key); }

// (EventColumns, ends); an end is (key, error as described or None, results).
ffi::Array<ffi::Any> feed_take(FeedRef feed) {
  EventColumns events;
  ffi::Array<ffi::Any> ends;
  for (const GenerationFeed::News& news : feed->feed.take()) {
    for (const GenerateEvent& event : news.events) events.add(news.key, event);
    if (!news.has_ended) continue;
    ffi::Any error;
    if (news.error) error = described(news.error);
    ffi::Array<Fields> results;
    for (const GenerateResult& result : news.generation->results()) {
      results.push_back(to_fields(result));
    }
    ends.push_back(ffi::Array<ffi::Any>{news.key, error, results});
  }
  return {events.take(), ends};
}

ffi::Array<ffi::Tensor> feed_prompt_scores(FeedRef feed, std::int64_t key, std::int64_t index) {
  return columns_of(feed->feed.prompt_scores(key, static_cast<std::size_t>(index)));
}

CLUSTERFUSION_EXPORT(feed_open)
CLUSTERFUSION_EXPORT(feed_start)
CLUSTERFUSION_EXPORT(feed_cancel)
CLUSTERFUSION_EXPORT(feed_take)
CLUSTERFUSION_EXPORT(feed_prompt_scores)

}  // namespace
}  // namespace clusterfusion::python
