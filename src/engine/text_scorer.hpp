// Scores of many texts, several of them in a pass of the backend.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/scored_prefill.hpp"
#include "engine/shared_backend.hpp"

namespace clusterfusion {

struct TextToScore {
  std::vector<TokenId> tokens;   // the last one is never fed
  std::size_t first_scored = 1;  // >= 1: tokens from here on are scored, at least one
};

// A few texts at a time have a sequence each; every pass takes the next pieces of them, as many
// tokens as the backend takes, and where one is done the next begins. A backend that does not pack
// prompts has one text at a time. A text's scores are the bits that it has alone.
class TextScorer {
 public:
  using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

  TextScorer(SharedBackend& backend, const ScoreDetail& detail)
      : backend_(backend), detail_(detail), interventions_(backend.interventions().now()) {}

  // Of each text, of its tokens from first_scored on. `progress` is told how many texts are done,
  // each in its turn; when it returns false the results end with those that it was told of.
  // Errors: those of the backend.
  std::vector<std::vector<ScoredToken>> score(std::span<const TextToScore> texts,
                                              const Progress& progress = {});

 private:
  struct Text {
    std::size_t index;
    std::unique_ptr<SequenceHandle> sequence;
    std::int64_t pages;
    std::size_t fed = 0;  // tokens
  };
  // A piece of a text in a pass.
  struct Piece {
    Text* text;
    std::size_t count;
    std::optional<ScoredPiece> scored;  // else it only leads there

    PrefillPart part(std::span<const TextToScore> texts) const;
  };

  void admit();
  std::vector<Piece> next_pieces();
  Piece make_piece(Text& text, std::size_t count);
  void run(std::vector<Piece> pieces);
  std::size_t feedable(const Text& text) const;
  bool is_done(const Text& text) const;

  SharedBackend& backend_;
  ScoreDetail detail_;
  std::shared_ptr<const Interventions> interventions_;
  std::span<const TextToScore> texts_;
  std::size_t next_ = 0;  // of texts_, to be admitted
  std::deque<Text> open_;
  std::int64_t open_pages_ = 0;
  std::vector<std::vector<ScoredToken>> scores_;
};

}  // namespace clusterfusion
