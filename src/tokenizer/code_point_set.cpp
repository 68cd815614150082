#include "tokenizer/code_point_set.hpp"

#include <algorithm>
#include <utility>

namespace clusterfusion {

CodePointSet::CodePointSet(std::vector<Range> ranges) {
  std::ranges::sort(ranges, {}, &Range::first);
  for (const Range& range : ranges) {
    if (ranges_.empty() || range.first > ranges_.back().last + 1) {
      ranges_.push_back(range);
    } else {
      ranges_.back().last = std::max(ranges_.back().last, range.last);
    }
  }
}

CodePointSet CodePointSet::operator|(const CodePointSet& other) const {
  std::vector<Range> ranges = ranges_;
  ranges.insert(ranges.end(), other.ranges_.begin(), other.ranges_.end());
  return CodePointSet(std::move(ranges));
}

CodePointSet CodePointSet::operator&(const CodePointSet& other) const {
  return (complement() | other.complement()).complement();
}

CodePointSet CodePointSet::complement() const {
  std::vector<Range> ranges;
  char32_t next = 0;
  for (const Range& range : ranges_) {
    if (range.first > next) ranges.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next < kEnd) ranges.push_back({next, kEnd - 1});
  return CodePointSet(std::move(ranges));
}

bool CodePointSet::contains(char32_t code_point) const noexcept {
  const auto after = std::ranges::upper_bound(ranges_, code_point, {}, &Range::first);
  return after != ranges_.begin() && std::prev(after)->last >= code_point;
}

}  // namespace clusterfusion
