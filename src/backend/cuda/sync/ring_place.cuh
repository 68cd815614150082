// Where a thread is in a ring of stages with two mbarriers each, full and empty. Both sides pass
// the stages in order; the parity that they wait for changes with each lap.
#pragma once

#include <cstdint>

namespace clusterfusion::device {

struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
  __device__ __forceinline__ void skip(int steps, int stages) {
    stage += steps;
    parity ^= stage / stages % 2;
    stage %= stages;
  }
};

}  // namespace clusterfusion::device
