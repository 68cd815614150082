#include "backend/load/upload.hpp"

#include <algorithm>
#include <atomic>

#include "base/thread_pool.hpp"

namespace clusterfusion {
namespace {

// The bytes [begin, begin + to.size()) of the device's block.
void fill(std::span<std::byte> to, std::int64_t begin, std::span<const UploadPart> parts,
          const UploadOptions& options) {
  const std::int64_t end = begin + std::ssize(to);
  auto next = to.begin();
  const auto first = std::ranges::partition_point(
      parts, [&](const UploadPart& part) { return part.offset + part.bytes <= begin; });
  for (auto part = first; part != parts.end() && part->offset < end; ++part) {
    const std::int64_t from = std::max(part->offset, begin);
    const std::int64_t count = std::min(part->offset + part->bytes, end) - from;
    const std::span source(part->source + (from - part->offset), count);
    std::fill(next, to.begin() + (from - begin), std::byte{0});
    next = std::ranges::copy(source, to.begin() + (from - begin)).out;
    if (options.after_reading) options.after_reading(source);
  }
  std::fill(next, to.end(), std::byte{0});
}

}  // namespace

void upload(std::span<const UploadPart> parts, std::int64_t total, StagingDevice& device,
            const UploadOptions& options) {
  const auto report = [&](std::int64_t done) {
    if (options.progress) options.progress(done, total);
  };
  report(0);
  const std::int64_t windows = (total + options.buffer_bytes - 1) / options.buffer_bytes;
  std::vector<int> turns(options.threads);
  std::atomic<std::int64_t> done = 0;
  std::atomic<bool> failed = false;
  const auto send_window = [&](std::int64_t window, int thread) {
    const int buffer = thread * kBuffersPerThread + turns[thread]++ % kBuffersPerThread;
    const std::int64_t begin = window * options.buffer_bytes;
    const std::int64_t bytes = std::min(options.buffer_bytes, total - begin);
    fill(device.acquire(buffer).first(bytes), begin, parts, options);
    device.start_copy(buffer, begin, bytes);
    done += bytes;
    if (thread == 0 && window + 1 < windows) report(done);  // the calling thread is number 0
  };
  ThreadPool pool(options.threads);
  pool.run(windows, [&](std::int64_t window, int thread) {
    if (failed) return;
    try {
      send_window(window, thread);
    } catch (...) {
      failed = true;
      throw;
    }
  });
  device.finish();
  report(total);
}

}  // namespace clusterfusion
