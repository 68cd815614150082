// Which checkpoints may draft for which.
#include "engine/model_draft.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/fixtures.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::AllOf;
using testing::HasSubstr;

std::shared_ptr<const Model> model_of_width(std::int64_t vocab_size) {
  ModelConfig config = small_config();
  config.vocab_size = vocab_size;
  config.num_layers = 1;
  return make_random_model(config);
}

TEST(SameVocabulary, MayBePaddedToOtherWidths) {
  const auto tokenizer = Tokenizer::parse(tokenizer_json(100), "target's");
  const auto drafts = Tokenizer::parse(tokenizer_json(100), "draft's");
  EXPECT_NO_THROW(require_same_vocabulary(*model_of_width(104), tokenizer.get(),
                                          *model_of_width(128), drafts.get()));
  const auto more = Tokenizer::parse(tokenizer_json(120), "draft's");
  EXPECT_NO_THROW(require_same_vocabulary(*model_of_width(104), tokenizer.get(),
                                          *model_of_width(128), more.get()));
  EXPECT_NO_THROW(
      require_same_vocabulary(*model_of_width(104), nullptr, *model_of_width(104), nullptr));
}

TEST(SameVocabulary, TellsTheFirstTokenThatDiffers) {
  const auto tokenizer = Tokenizer::parse(tokenizer_json(100), "target's");
  expect_error(
      ErrorKind::invalid_argument,
      AllOf(HasSubstr("does not fit"), HasSubstr("token 0 is \"<|endoftext|>\" in the draft "
                                                 "and \"t0\" in the model")),
      [&] {
        require_same_vocabulary(*model_of_width(104), tokenizer.get(), *model_of_width(320),
                                byte_tokenizer().get());
      });
}

TEST(SameVocabulary, WantsTokenizersThatCanBeCompared) {
  const auto tokenizer = Tokenizer::parse(tokenizer_json(100), "target's");
  expect_error(ErrorKind::invalid_argument, HasSubstr("only"), [&] {
    require_same_vocabulary(*model_of_width(104), tokenizer.get(), *model_of_width(104), nullptr);
  });
  expect_error(ErrorKind::invalid_argument, HasSubstr("104 and 105"), [&] {
    require_same_vocabulary(*model_of_width(105), nullptr, *model_of_width(104), nullptr);
  });
}

}  // namespace
}  // namespace clusterfusion
