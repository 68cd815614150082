// Time to bring a checkpoint onto the GPU, beside what the bus gives.
//   load_time FOLDER [REPEATS]
// The first time counts too, but is told apart: the file may not be in the page cache then. Prints
// one JSON document.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device_model.hpp"
#include "clusterfusion/error.hpp"

using namespace clusterfusion;

namespace {

double seconds_of(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Bytes per second from one pinned buffer, with nothing else to do.
double measure_bus() {
  constexpr std::int64_t kBytes = 64 << 20;
  constexpr int kCopies = 32;
  const cuda::PinnedMemory host(kBytes, "a benchmark");
  const cuda::DeviceMemory device(kBytes, "a benchmark");
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const double seconds = seconds_of([&] {
      for (int i = 0; i < kCopies; ++i)
        cuda::check(
            cudaMemcpyAsync(device.as<>(), host.as<>(), kBytes, cudaMemcpyHostToDevice, nullptr),
            "copying");
      cuda::check(cudaDeviceSynchronize(), "copying");
    });
    best = std::max(best, kCopies * kBytes / seconds);
  }
  return best;
}

double load(const char* folder, std::int64_t& bytes) {
  return seconds_of([&] {
    const auto model = Model::open(folder);
    const cuda::DeviceModel device(*model, {.positions = 64, .kv_page_bytes = 1});
    bytes = device.weights().bytes();
  });
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) return std::fprintf(stderr, "usage: load_time FOLDER [REPEATS]\n"), 2;
  const int repeats = argc > 2 ? std::max(1, std::atoi(argv[2])) : 5;
  const double bus = measure_bus();
  std::int64_t bytes = 0;
  const double first = load(argv[1], bytes);
  std::vector<double> seconds;
  for (int repeat = 0; repeat < repeats; ++repeat) seconds.push_back(load(argv[1], bytes));
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  std::fputs(
      fmt::format(R"({{"bytes": {}, "first_seconds": {:.4f}, "seconds": {{"median": {:.4f}, )"
                  R"("low": {:.4f}, "high": {:.4f}}}, "bytes_per_second": {:.4e}, )"
                  R"("bus_bytes_per_second": {:.4e}}})"
                  "\n",
                  bytes, first, median, seconds.front(), seconds.back(),
                  static_cast<double>(bytes) / median, bus)
          .c_str(),
      stdout);
  return 0;
} catch (const Error& error) {
  return std::fprintf(stderr, "load_time: %s\n", error.what()), 1;
}
