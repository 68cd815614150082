// How long a step of the model takes, by the number of its rows.
#pragma once

#include <cstdint>
#include <map>

namespace clusterfusion {

class StepCosts {
 public:
  void note(std::int32_t rows, double seconds);
  // 0 before anything is known. Between known numbers on a line; beyond the largest in proportion
  // to the rows, as if the device gained nothing by them.
  double seconds(std::int32_t rows) const;

 private:
  std::map<std::int32_t, double> known_;
};

}  // namespace clusterfusion
