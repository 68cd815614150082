// What L2 is to do with the lines that a copy brings (createpolicy, sm_80 and later).
#pragma once

#include <cstdint>

namespace clusterfusion::device {

// Of data that is read once, such as weights of which there are more than L2 holds: they leave
// first, so that what many SMs read again and again stays. Else L2's own.
__device__ __forceinline__ std::uint64_t l2_policy(bool is_read_once) {
  std::uint64_t policy;
  if (is_read_once)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace clusterfusion::device
