#include "base/hash64.hpp"

#include <gtest/gtest.h>

#include <string_view>

namespace clusterfusion {
namespace {

std::uint64_t hash_of(std::string_view text, std::uint64_t seed = 0) {
  return hash64(std::as_bytes(std::span(text)), seed);
}

// Values of the xxhash package for Python (its documentation), and of xxHash's own sanity check.
TEST(Hash64, IsXxh64) {
  EXPECT_EQ(hash_of(""), 0xEF46DB3751D8E999u);
  EXPECT_EQ(hash_of("a"), 0xD24EC4F1A98C6E5Bu);
  EXPECT_EQ(hash_of("abc"), 0x44BC2CF5AD770999u);
  EXPECT_EQ(hash_of("xxhash", 20141025), 0xB559B98D844E0635u);
  EXPECT_EQ(hash_of("Nobody inspects the spammish repetition"), 0xFBCEA83C8A378BF1u);
}

}  // namespace
}  // namespace clusterfusion
