#include "recorded_bits.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>

#include "base/hash64.hpp"

namespace clusterfusion::test {
namespace {

using Hashes = std::map<std::string, std::uint64_t>;

Hashes read_hashes(const char* path) {
  Hashes hashes;
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << "CLUSTERFUSION_EXPECT_BITS: " << path << " cannot be read";
  std::string what;
  std::uint64_t hash = 0;
  while (file >> what >> hash) hashes[what] = hash;
  return hashes;
}

}  // namespace

void expect_recorded_bits(const std::string& what, std::span<const std::byte> bytes) {
  if (const char* const path = std::getenv("CLUSTERFUSION_RECORD_BITS"); path != nullptr) {
    std::ofstream file(path, std::ios::app);
    file << what << ' ' << hash64(bytes) << '\n';
    EXPECT_TRUE(file.good()) << "CLUSTERFUSION_RECORD_BITS: " << path << " cannot be written";
  }
  if (const char* const path = std::getenv("CLUSTERFUSION_EXPECT_BITS"); path != nullptr) {
    static const Hashes recorded = read_hashes(path);
    const auto found = recorded.find(what);
    ASSERT_NE(found, recorded.end()) << path << " has no bits of " << what;
    EXPECT_EQ(hash64(bytes), found->second) << "other bits than in " << path << ": " << what;
  }
}

}  // namespace clusterfusion::test
