// Pages that go to the host and come back in another backend, as saved prompts do.
#include <gtest/gtest.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "gpu_fixture.hpp"

namespace clusterfusion::test {
namespace {

using Bytes = std::vector<std::byte>;

std::vector<Bytes> contents_of(Backend& backend, SequenceId id, std::int64_t count) {
  std::vector<Bytes> contents;
  for (std::int64_t i = 0; i < count; ++i) {
    const KvPageId page = backend.hold_page(id, i);
    contents.emplace_back(static_cast<std::size_t>(backend.info().page_bytes()));
    backend.read_page(page, contents.back());
    backend.drop_page(page);
  }
  return contents;
}

SequenceId sequence_of(Backend& backend, std::span<const TokenId> tokens,
                       const std::vector<Bytes>& contents) {
  std::vector<KvPageId> pages;
  for (const Bytes& content : contents) pages.push_back(backend.add_page(content));
  const SequenceId id = backend.create_sequence({}, tokens, pages, nullptr);
  for (const KvPageId page : pages) backend.drop_page(page);
  EXPECT_EQ(backend.kv_pages_in_use(), static_cast<std::int64_t>(contents.size()));
  return id;
}

// Logits at each of the tokens, appended at once, and behind a decode step.
std::vector<float> logits_behind(Backend& backend, std::int64_t vocab, SequenceId id,
                                 std::span<const TokenId> tokens) {
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<float> logits((tokens.size() + 1) * width);
  PrefillOutput output;
  output.all_logits = std::span(logits).first(tokens.size() * width);
  backend.prefill(id, tokens, output);
  const TokenId input = 7;
  backend.decode(std::span(&id, 1), std::span(&input, 1), 1, {}, std::span(logits).last(width));
  return logits;
}

class SavedPages : public GpuTest, public testing::WithParamInterface<DecodeMode> {};

TEST_P(SavedPages, GoOnInAnotherBackend) {
  for (const Shape& shape : gpu_shapes()) {
    if (shape.name != "tiny" && shape.name != "tiny_bf16" && shape.name != "pythia_410m_like")
      continue;
    SCOPED_TRACE(shape.name);
    const ModelConfig config = config_of(shape);
    const auto model = make_random_model(config);
    BackendOptions options;
    options.mode = GetParam();
    const auto first = make_cuda_backend(model, options);
    const std::int64_t whole = kKvPagePositions;
    ASSERT_GT(whole, 0);
    const auto tokens = random_tokens(config.vocab_size, static_cast<int>(whole) + 37, 3);
    const auto beginning = std::span(tokens).first(static_cast<std::size_t>(whole));
    const auto rest = std::span(tokens).subspan(static_cast<std::size_t>(whole));
    const SequenceId id = first->create_sequence({});
    first->prefill(id, beginning, {});
    const std::vector<Bytes> contents = contents_of(*first, id, kv_pages_of(whole));

    const auto second = make_cuda_backend(model, options);
    EXPECT_EQ(second->info().arithmetic, first->info().arithmetic);
    const SequenceId copy = sequence_of(*second, beginning, contents);
    EXPECT_EQ(contents_of(*second, copy, kv_pages_of(whole)), contents);
    EXPECT_EQ(logits_behind(*second, config.vocab_size, copy, rest),
              logits_behind(*first, config.vocab_size, id, rest));
    second->release_sequence(copy);
    EXPECT_EQ(second->kv_pages_in_use(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, SavedPages,
                         testing::Values(DecodeMode::latency, DecodeMode::throughput),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace clusterfusion::test
