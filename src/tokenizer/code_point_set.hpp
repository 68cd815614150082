// Sets of code points.
#pragma once

#include <vector>

namespace clusterfusion {

class CodePointSet {
 public:
  static constexpr char32_t kEnd = 0x110000;
  struct Range {
    char32_t first, last;  // both are in it
    bool operator==(const Range&) const = default;
  };

  CodePointSet() = default;
  // The union of ranges in any order.
  explicit CodePointSet(std::vector<Range> ranges);

  bool operator==(const CodePointSet&) const = default;
  CodePointSet operator|(const CodePointSet& other) const;
  CodePointSet operator&(const CodePointSet& other) const;
  CodePointSet complement() const;
  bool contains(char32_t code_point) const noexcept;
  // Sorted, neither touching nor overlapping.
  const std::vector<Range>& ranges() const noexcept { return ranges_; }

 private:
  std::vector<Range> ranges_;
};

}  // namespace clusterfusion
