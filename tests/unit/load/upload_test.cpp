// The upload against a device that copies as late as it may, and so shows whatever is overwritten
// too early.
#include "backend/load/upload.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

namespace clusterfusion {
namespace {

using testing::ElementsAre;

// A copy happens when its buffer is wanted again, or at the end: until then its source must stay.
class LateDevice final : public StagingDevice {
 public:
  LateDevice(int threads, std::int64_t buffer_bytes, std::int64_t total)
      : block(total, std::byte{0xEE}), buffers_(threads * kBuffersPerThread) {
    for (Buffer& buffer : buffers_) buffer.bytes.resize(buffer_bytes);
  }

  std::span<std::byte> acquire(int index) override {
    note("acquire", index);
    complete(buffers_.at(index));
    return buffers_[index].bytes;
  }
  void start_copy(int index, std::int64_t offset, std::int64_t bytes) override {
    note("copy", index);
    Buffer& buffer = buffers_.at(index);
    EXPECT_FALSE(buffer.busy) << "a buffer was not acquired before it was filled";
    EXPECT_LE(bytes, std::ssize(buffer.bytes));
    if (fail_at == offset) throw std::runtime_error("the device is gone");
    buffer.busy = true;
    buffer.offset = offset;
    buffer.count = bytes;
  }
  void finish() override {
    note("finish", -1);
    for (Buffer& buffer : buffers_) complete(buffer);
  }

  std::vector<std::byte> block;
  std::vector<std::string> log;
  std::int64_t fail_at = -1;

 private:
  struct Buffer {
    std::vector<std::byte> bytes;
    bool busy = false;
    std::int64_t offset = 0, count = 0;
  };
  void complete(Buffer& buffer) {
    if (!buffer.busy) return;
    std::copy_n(buffer.bytes.begin(), buffer.count, block.begin() + buffer.offset);
    buffer.busy = false;
  }
  void note(const std::string& what, int index) {
    const std::lock_guard lock(mutex_);
    log.push_back(index < 0 ? what : what + " " + std::to_string(index));
  }

  std::vector<Buffer> buffers_;
  std::mutex mutex_;
};

// Parts of random sizes (some empty) with random gaps, and the block that they should become.
struct Material {
  std::vector<std::byte> source;
  std::vector<UploadPart> parts;
  std::vector<std::byte> expected;
};

Material random_material(unsigned seed, int num_parts, std::int64_t longest) {
  std::mt19937 random(seed);
  Material material;
  std::vector<std::int64_t> sizes(num_parts);
  for (auto& size : sizes) size = random() % 4 == 0 ? 0 : random() % (longest + 1);
  material.source.resize(std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0}));
  for (auto& byte : material.source) byte = static_cast<std::byte>(random());
  const std::byte* next = material.source.data();
  for (const std::int64_t size : sizes) {
    material.expected.resize(material.expected.size() + random() % 3 * 7);
    material.parts.push_back({next, size, std::ssize(material.expected)});
    material.expected.insert(material.expected.end(), next, next + size);
    next += size;
  }
  material.expected.resize(material.expected.size() + random() % 9);
  return material;
}

TEST(Upload, BringsEveryByteToItsPlace) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    const Material material = random_material(seed, seed % 23, 1 + seed % 400);
    const std::int64_t total = std::ssize(material.expected);
    const int threads = 1 + static_cast<int>(seed % 4);
    const std::int64_t buffer_bytes = 1 + seed * 13 % 300;
    LateDevice device(threads, buffer_bytes, total);
    upload(material.parts, total, device, {.threads = threads, .buffer_bytes = buffer_bytes});
    ASSERT_EQ(device.block, material.expected) << "seed " << seed;
  }
}

TEST(Upload, FillsOneBufferWhileTheOtherIsCopied) {
  const std::vector<std::byte> source(50);
  LateDevice device(1, 10, 50);
  upload(std::vector<UploadPart>{{source.data(), 50, 0}}, 50, device,
         {.threads = 1, .buffer_bytes = 10});
  EXPECT_THAT(device.log,
              ElementsAre("acquire 0", "copy 0", "acquire 1", "copy 1", "acquire 0", "copy 0",
                          "acquire 1", "copy 1", "acquire 0", "copy 0", "finish"));
}

TEST(Upload, ReportsProgressOnTheCallingThreadFromNoneToAll) {
  const Material material = random_material(5, 40, 1000);
  const std::int64_t total = std::ssize(material.expected);
  LateDevice device(3, 64, total);
  std::vector<std::int64_t> seen;
  const auto caller = std::this_thread::get_id();
  upload(material.parts, total, device,
         {.threads = 3, .buffer_bytes = 64, .progress = [&](std::int64_t done, std::int64_t all) {
            EXPECT_TRUE(std::this_thread::get_id() == caller);
            EXPECT_EQ(all, total);
            seen.push_back(done);
          }});
  ASSERT_GE(seen.size(), 2u);
  EXPECT_EQ(seen.front(), 0);
  EXPECT_EQ(seen.back(), total);
  EXPECT_TRUE(std::ranges::is_sorted(seen));
}

TEST(Upload, SaysOfEachByteOnceThatItHasBeenRead) {
  const Material material = random_material(6, 40, 1000);
  const std::int64_t total = std::ssize(material.expected);
  LateDevice device(3, 64, total);
  std::vector<std::atomic<int>> reads(material.source.size());
  upload(material.parts, total, device,
         {.threads = 3, .buffer_bytes = 64, .after_reading = [&](std::span<const std::byte> bytes) {
            for (const std::byte& byte : bytes) ++reads[&byte - material.source.data()];
          }});
  EXPECT_TRUE(std::ranges::all_of(reads, [](const auto& count) { return count == 1; }));
}

TEST(Upload, EndsWithTheFirstError) {
  const Material material = random_material(7, 40, 1000);
  const std::int64_t total = std::ssize(material.expected);
  ASSERT_GT(total, 6400);
  LateDevice device(2, 64, total);
  device.fail_at = 640;
  const auto run = [&](auto progress) {
    upload(material.parts, total, device, {.threads = 2, .buffer_bytes = 64, .progress = progress});
  };
  EXPECT_THROW(run([](std::int64_t, std::int64_t) {}), std::runtime_error);
  EXPECT_THAT(device.log, testing::Not(testing::Contains("finish")));

  // What the caller's own progress throws comes out as well.
  device.fail_at = -1;
  EXPECT_THROW(run([](std::int64_t, std::int64_t) { throw std::logic_error("enough"); }),
               std::logic_error);
}

TEST(Upload, OfNothingIsDone) {
  LateDevice device(1, 8, 0);
  std::vector<std::int64_t> seen;
  upload({}, 0, device,
         {.threads = 1, .buffer_bytes = 8, .progress = [&](std::int64_t done, std::int64_t) {
            seen.push_back(done);
          }});
  EXPECT_THAT(seen, ElementsAre(0, 0));
}

}  // namespace
}  // namespace clusterfusion
