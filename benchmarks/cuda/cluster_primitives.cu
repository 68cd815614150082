// Time cluster_reduce and cluster_gather (src/backend/cuda/device/cluster_exchange.cuh) beside the
// same by loads from the other blocks' shared memory, and through global memory.
//   cluster_primitives [REPEATS]
// One block of 256 threads on each SM, in clusters of 2, 4, 8 and 16; kCalls calls in one launch,
// each on what the one before has left, so that a time is that of one call with nothing beside it.
// `bytes` is what every block has afterwards: the float32 vector, or all pieces. "chosen" names
// which way cluster_reduce takes at that size. Every block's result is checked.
// Prints one JSON document on stdout, a table on stderr.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device/cluster_exchange.cuh"
#include "backend/cuda/device/counter.cuh"

using namespace clusterfusion::device;
using clusterfusion::cuda::check;

namespace {

constexpr int kThreads = 256;
constexpr int kCalls = 1000;

enum class Way { directly, in_slices, push, loads, global };

const char* name_of(Way way) {
  switch (way) {
    case Way::directly: return "directly";
    case Way::in_slices: return "in slices";
    case Way::push: return "push";
    case Way::loads: return "DSMEM loads";
    case Way::global: return "global memory";
  }
  return "";
}

struct Job {
  const float* in;          // [blocks, floats of a block]
  float* out;               // likewise
  uint4* exchanged;         // [2, blocks, words of a block], for Way::global
  std::uint32_t* counters;  // one a cluster, zero at first
  int words;                // 16 bytes each, of a block's vector or piece
  int buffer_bytes;
};

// Keeps the vector bounded: what is equal in all blocks stays as it is.
struct Mean {
  __host__ __device__ float operator()(float a, float b) const { return (a + b) * 0.5f; }
};

__device__ uint4 mean(uint4 a, uint4 b) {
  float x[4], y[4];
  std::memcpy(x, &a, 16);
  std::memcpy(y, &b, 16);
  for (int i = 0; i < 4; ++i) x[i] = Mean{}(x[i], y[i]);
  std::memcpy(&a, x, 16);
  return a;
}

// Through global memory: a block's words to its place, a counter on which the cluster's blocks wait
// for each other, and all blocks' words from L2. Halves in turn, as in ClusterExchange.
template <int kSize>
class GlobalExchange {
 public:
  __device__ explicit GlobalExchange(const Job& job) : job_(job) {}

  // Publishes this block's words; gives the cluster's first block's, the others' lie behind.
  __device__ const uint4* exchange(const uint4* values) {
    const int cluster = static_cast<int>(blockIdx.x) / kSize;
    uint4* half = job_.exchanged + (number_ % 2) * gridDim.x * job_.words;
    __syncthreads();
    for (int i = threadIdx.x; i < job_.words; i += kThreads)
      half[blockIdx.x * job_.words + i] = values[i];
    __syncthreads();
    ++number_;
    if (threadIdx.x == 0) {
      counter_add_release(job_.counters + cluster, 1);
      counter_wait(job_.counters + cluster, number_ * kSize);
    }
    __syncthreads();
    return half + cluster * kSize * job_.words;
  }

 private:
  const Job& job_;
  std::uint32_t number_ = 0;
};

template <int kSize, Way kWay>
__device__ void reduce_many(const Job& job, uint4* values, ClusterExchange<kSize>& cluster) {
  GlobalExchange<kSize> global(job);
  for (int call = 0; call < kCalls; ++call) {
    if constexpr (kWay == Way::directly) {
      cluster.template reduce_directly<float>(values, job.words, Mean{});
    } else if constexpr (kWay == Way::in_slices) {
      cluster.template reduce_in_slices<float>(values, job.words, Mean{});
    } else if constexpr (kWay == Way::loads) {
      cluster_barrier();
      constexpr int kMost = 4;  // words of a thread; 16 KB
      uint4 totals[kMost];
#pragma unroll
      for (int round = 0; round < kMost; ++round) {
        const int i = static_cast<int>(threadIdx.x) + round * kThreads;
        if (i >= job.words) break;
        uint4 words[kSize];
#pragma unroll
        for (int rank = 0; rank < kSize; ++rank) words[rank] = *of_block(values + i, rank);
        totals[round] = words[0];
#pragma unroll
        for (int rank = 1; rank < kSize; ++rank) totals[round] = mean(totals[round], words[rank]);
      }
      cluster_barrier();
#pragma unroll
      for (int round = 0; round < kMost; ++round) {
        const int i = static_cast<int>(threadIdx.x) + round * kThreads;
        if (i < job.words) values[i] = totals[round];
      }
    } else {
      const uint4* all = global.exchange(values);
      for (int i = threadIdx.x; i < job.words; i += kThreads) {
        uint4 words[kSize];
#pragma unroll
        for (int rank = 0; rank < kSize; ++rank) words[rank] = __ldcg(all + rank * job.words + i);
        uint4 total = words[0];
#pragma unroll
        for (int rank = 1; rank < kSize; ++rank) total = mean(total, words[rank]);
        values[i] = total;
      }
      __syncthreads();
    }
  }
}

template <int kSize, Way kWay>
__device__ void gather_many(const Job& job, uint4* values, uint4* buffer,
                            ClusterExchange<kSize>& cluster) {
  GlobalExchange<kSize> global(job);
  const int next = (static_cast<int>(cluster_rank()) + 1) % kSize;
  const int all_words = kSize * job.words;
  for (int call = 0; call < kCalls; ++call) {
    const uint4* all = buffer;
    if constexpr (kWay == Way::push) {
      all = reinterpret_cast<const uint4*>(
          cluster_gather(cluster, reinterpret_cast<const float*>(values), job.words * 4));
    } else {
      const uint4* published = nullptr;
      if constexpr (kWay == Way::loads)
        cluster_barrier();
      else
        published = global.exchange(values);
      for (int i = threadIdx.x; i < all_words; i += kThreads) {
        if constexpr (kWay == Way::loads)
          buffer[i] = *of_block(values + i % job.words, i / job.words);
        else
          buffer[i] = __ldcg(published + i);
      }
      // The pieces may be overwritten when everybody has them.
      if constexpr (kWay == Way::loads)
        cluster_barrier();
      else
        __syncthreads();
    }
    // The next call's piece is that of the next block: it cannot begin before this one is done.
    for (int i = threadIdx.x; i < job.words; i += kThreads) values[i] = all[next * job.words + i];
  }
}

template <int kSize, bool kGathers, Way kWay>
__global__ void __launch_bounds__(kThreads) run_calls(Job job) {
  extern __shared__ __align__(16) uint4 shared[];
  auto* control = reinterpret_cast<ClusterControl*>(shared);
  uint4* values = shared + 1;
  uint4* buffer = values + job.words;
  ClusterExchange<kSize> cluster(control, buffer, job.buffer_bytes);
  const auto* in = reinterpret_cast<const uint4*>(job.in) + blockIdx.x * job.words;
  auto* out = reinterpret_cast<uint4*>(job.out) + blockIdx.x * job.words;
  for (int i = threadIdx.x; i < job.words; i += kThreads) values[i] = in[i];
  if constexpr (kGathers)
    gather_many<kSize, kWay>(job, values, buffer, cluster);
  else
    reduce_many<kSize, kWay>(job, values, cluster);
  __syncthreads();
  for (int i = threadIdx.x; i < job.words; i += kThreads) out[i] = values[i];
  cluster_barrier();  // nobody's shared memory goes while another loads from it
}

struct Row {
  const char* operation;
  Way way;
  int size, bytes, clusters;
  bool chosen;
  double median, low, high;  // nanoseconds a call
};

// Device memory that the host sees.
template <typename T>
class Shared {
 public:
  explicit Shared(std::size_t count) {
    check(cudaMallocManaged(&data_, count * sizeof(T)), "allocating for the benchmark");
  }
  ~Shared() { cudaFree(data_); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// What block `block` must have at element i.
template <int kSize, bool kGathers>
float expected(const float* in, int floats, int block, int i) {
  const auto at = [&](int rank) { return in[(block / kSize * kSize + rank) * floats + i]; };
  if constexpr (kGathers) return at((block % kSize + kCalls) % kSize);
  float total = at(0);
  for (int rank = 1; rank < kSize; ++rank) total = Mean{}(total, at(rank));
  return total;
}

// Nothing to be measured where clusters of this size do not fit.
template <int kSize, bool kGathers, Way kWay>
void measure(int bytes, int repeats, std::vector<Row>& rows) {
  auto* kernel = run_calls<kSize, kGathers, kWay>;
  Job job{};
  job.words = (kGathers ? bytes / kSize : bytes) / 16;
  job.buffer_bytes = kGathers                ? cluster_gather_bytes<kSize>(job.words * 16)
                     : kWay == Way::directly ? cluster_reduce_directly_bytes<kSize>(bytes)
                                             : cluster_reduce_in_slices_bytes<kSize>(bytes);
  int device = 0, most_shared = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  // More than half of an SM's, so that each SM has one block.
  const int shared_bytes = std::max(16 + job.words * 16 + job.buffer_bytes, most_shared / 2 + 4096);
  if (job.words == 0 || (kWay == Way::in_slices && job.words < kSize) || shared_bytes > most_shared)
    return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "reserving shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "allowing large clusters");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kSize;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kSize);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess || clusters == 0) {
    cudaGetLastError();
    return;
  }
  const int blocks = clusters * kSize;
  config.gridDim = dim3(static_cast<unsigned>(blocks));

  const int floats = job.words * 4;
  const auto count = static_cast<std::size_t>(blocks) * floats;
  const Shared<float> in(count), out(count);
  const Shared<uint4> exchanged(static_cast<std::size_t>(2) * blocks * job.words);
  const Shared<std::uint32_t> counters(static_cast<std::size_t>(clusters));
  for (std::size_t i = 0; i < count; ++i) in.data()[i] = static_cast<float>(i * 7919 % 1009);
  job.in = in.data();
  job.out = out.data();
  job.exchanged = exchanged.data();
  job.counters = counters.data();
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "creating an event");
  check(cudaEventCreate(&end), "creating an event");
  std::vector<double> times;
  for (int repeat = -2; repeat < repeats; ++repeat) {
    check(cudaMemsetAsync(job.counters, 0, sizeof(std::uint32_t) * clusters), "clearing counters");
    check(cudaEventRecord(begin), "recording an event");
    check(cudaLaunchKernelEx(&config, kernel, job), "launching");
    check(cudaEventRecord(end), "recording an event");
    check(cudaEventSynchronize(end), "running the calls");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "reading the time");
    if (repeat >= 0) times.push_back(milliseconds * 1e6 / kCalls);
  }
  check(cudaEventDestroy(begin), "destroying an event");
  check(cudaEventDestroy(end), "destroying an event");
  for (int block = 0; block < blocks; ++block)
    for (int i = 0; i < floats; ++i)
      if (out.data()[block * floats + i] != expected<kSize, kGathers>(in.data(), floats, block, i))
        throw std::runtime_error(std::string(kGathers ? "gather " : "reduce ") + name_of(kWay) +
                                 " of " + std::to_string(bytes) + " bytes in clusters of " +
                                 std::to_string(kSize) + ": block " + std::to_string(block) +
                                 " has a wrong element " + std::to_string(i));
  std::sort(times.begin(), times.end());
  const bool limit = bytes <= cluster_reduce_directly_limit<kSize>() || job.words < kSize;
  const bool chosen =
      kWay == Way::push || (kWay == Way::directly && limit) || (kWay == Way::in_slices && !limit);
  rows.push_back({kGathers ? "gather" : "reduce", kWay, kSize, bytes, clusters, chosen,
                  times[times.size() / 2], times.front(), times.back()});
}

template <int kSize>
void measure_size(int repeats, std::vector<Row>& rows) {
  for (const int bytes : {256, 2048, 10240}) {
    measure<kSize, false, Way::directly>(bytes, repeats, rows);
    measure<kSize, false, Way::in_slices>(bytes, repeats, rows);
    measure<kSize, false, Way::loads>(bytes, repeats, rows);
    measure<kSize, false, Way::global>(bytes, repeats, rows);
    measure<kSize, true, Way::push>(bytes, repeats, rows);
    measure<kSize, true, Way::loads>(bytes, repeats, rows);
    measure<kSize, true, Way::global>(bytes, repeats, rows);
  }
}

void run(int repeats) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "asking for the device's properties");
  if (properties.major < 9) throw std::runtime_error("clusters need compute capability 9.0");
  std::vector<Row> rows;
  measure_size<2>(repeats, rows);
  measure_size<4>(repeats, rows);
  measure_size<8>(repeats, rows);
  measure_size<16>(repeats, rows);
  std::printf(
      "{\"benchmark\": \"cluster_primitives\", \"device\": \"%s\", \"threads\": %d, \"calls\": %d, "
      "\"repeats\": %d, \"results\": [",
      properties.name, kThreads, kCalls, repeats);
  std::fprintf(stderr, "%s, ns a call: median (lowest to highest)\n", properties.name);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::printf(
        "%s{\"operation\": \"%s\", \"way\": \"%s\", \"chosen\": %s, \"cluster\": %d, \"bytes\": "
        "%d, \"clusters\": %d, \"ns\": %.1f, \"low\": %.1f, \"high\": %.1f}",
        i == 0 ? "" : ", ", r.operation, name_of(r.way), r.chosen ? "true" : "false", r.size,
        r.bytes, r.clusters, r.median, r.low, r.high);
    std::fprintf(stderr, "%s %6d B, clusters of %2d: %-13s%c %7.0f (%.0f to %.0f)\n", r.operation,
                 r.bytes, r.size, name_of(r.way), r.chosen ? '*' : ' ', r.median, r.low, r.high);
  }
  std::printf("]}\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  if (argc > 2 || repeats < 1) {
    std::fprintf(stderr, "usage: cluster_primitives [REPEATS]\n");
    return 2;
  }
  try {
    run(repeats);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cluster_primitives: %s\n", error.what());
    return 1;
  }
}
