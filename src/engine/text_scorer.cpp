#include "engine/text_scorer.hpp"

#include <algorithm>
#include <utility>

namespace clusterfusion {
namespace {

// Pages of the texts that are under way, at most, but for one that needs more alone: twice what a
// pass fills, for texts that leave much of their last page empty.
std::int64_t most_pages(const BackendInfo& info) { return 2 * kv_pages_of(info.prefill_chunk); }

}  // namespace

std::vector<std::vector<ScoredToken>> TextScorer::score(std::span<const TextToScore> texts,
                                                        const Progress& progress) {
  texts_ = texts;
  scores_.resize(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    scores_[i].resize(texts[i].tokens.size() - texts[i].first_scored);
  }
  std::vector<bool> done(texts.size());
  std::size_t num_told = 0;
  while (num_told < texts.size()) {
    admit();
    run(next_pieces());
    for (const Text& text : open_) {
      if (!is_done(text)) continue;
      done[text.index] = true;
      open_pages_ -= text.pages;
    }
    std::erase_if(open_, [this](const Text& text) { return is_done(text); });
    for (; num_told < texts.size() && done[num_told]; ++num_told) {
      const auto told = static_cast<std::int64_t>(num_told + 1);
      if (!progress || progress(told, std::ssize(texts))) continue;
      open_.clear();
      scores_.resize(num_told + 1);
      return std::move(scores_);
    }
  }
  return std::move(scores_);
}

void TextScorer::admit() {
  while (next_ < texts_.size()) {
    const std::int64_t positions = std::ssize(texts_[next_].tokens) - 1;
    const std::int64_t pages = kv_pages_of(positions);
    if (!open_.empty() && open_pages_ + pages > most_pages(backend_.info())) return;
    open_.push_back(
        {next_++,
         std::make_unique<SequenceHandle>(backend_, SamplingParams{}, positions, interventions_),
         pages});
    open_pages_ += pages;
  }
}

bool TextScorer::is_done(const Text& text) const {
  return text.fed + 1 == texts_[text.index].tokens.size();
}

// Tokens of its next piece, if the backend takes so many: all behind them are scored, or none.
std::size_t TextScorer::feedable(const Text& text) const {
  const TextToScore& given = texts_[text.index];
  const std::size_t lead = given.first_scored - 1;
  return (text.fed < lead ? lead : given.tokens.size() - 1) - text.fed;
}

std::vector<TextScorer::Piece> TextScorer::next_pieces() {
  auto left = static_cast<std::size_t>(backend_.info().prefill_chunk);
  auto scored_left = static_cast<std::size_t>(scored_piece(backend_.info(), detail_));
  std::vector<Piece> pieces;
  for (Text& text : open_) {
    const bool is_scored = text.fed + 1 >= texts_[text.index].first_scored;
    const std::size_t most = is_scored ? std::min(left, scored_left) : left;
    const std::size_t count = std::min(feedable(text), most);
    if (count == 0) continue;
    left -= count;
    if (is_scored) scored_left -= count;
    pieces.push_back(make_piece(text, count));
  }
  return pieces;
}

TextScorer::Piece TextScorer::make_piece(Text& text, std::size_t count) {
  const TextToScore& given = texts_[text.index];
  const std::span<const TokenId> tokens = given.tokens;
  Piece piece{&text, count, std::nullopt};
  if (text.fed + 1 < given.first_scored) return piece;
  const std::size_t first = text.fed + 1 - given.first_scored;
  piece.scored.emplace(backend_.model().config().vocab_size, text.sequence->id(),
                       tokens.subspan(text.fed, count), tokens.subspan(text.fed + 1, count),
                       detail_, std::span(scores_[text.index]).subspan(first, count));
  return piece;
}

PrefillPart TextScorer::Piece::part(std::span<const TextToScore> texts) const {
  if (scored) return scored->part();
  const std::span<const TokenId> tokens = texts[text->index].tokens;
  return {text->sequence->id(), tokens.subspan(text->fed, count), {}};
}

void TextScorer::run(std::vector<Piece> pieces) {
  std::vector<PrefillPart> parts;
  for (const Piece& piece : pieces) parts.push_back(piece.part(texts_));
  backend_.run([&](Backend& device) { device.prefill_together(parts); });
  for (Piece& piece : pieces) {
    if (piece.scored) piece.scored->collect();
    piece.text->fed += piece.count;
  }
}

}  // namespace clusterfusion
