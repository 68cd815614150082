// Bits that two builds must have in common, for what copies by cp.async and by bulk copies:
//   CLUSTERFUSION_RECORD_BITS=FILE  the tests write a hash of each result to FILE, a line each
//   CLUSTERFUSION_EXPECT_BITS=FILE  they compare with what another build has written there
// Without either variable nothing is done.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace clusterfusion::test {

// `what` names the result, without spaces; the same in both builds, and no other result's. Fails
// the test if FILE has other bits of it, or none.
void expect_recorded_bits(const std::string& what, std::span<const std::byte> bytes);

}  // namespace clusterfusion::test
