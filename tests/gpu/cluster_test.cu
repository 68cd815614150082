// cluster_reduce and cluster_gather (src/backend/cuda/device/cluster_exchange.cuh) against the same
// on the host: every block's copy, all cluster sizes, awkward lengths, many calls in one kernel.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device/cluster_exchange.cuh"
#include "backend/cuda/memory.hpp"

namespace clusterfusion::test {
namespace {

using namespace device;

enum class Way : int { chosen, directly, in_slices };

// What attention's splits leave: a maximum and a sum relative to it. 8 bytes, and merging rounds.
struct SoftmaxState {
  float maximum;
  float sum;
};

struct Sum {
  __host__ __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __host__ __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};
struct Merge {
  __host__ __device__ SoftmaxState operator()(SoftmaxState a, SoftmaxState b) const {
    const float maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
    return {maximum, a.sum * exp2f(a.maximum - maximum) + b.sum * exp2f(b.maximum - maximum)};
  }
};
// 16 bytes; neither commutative nor associative, so that it tells every wrong order.
struct Fold {
  __host__ __device__ uint4 operator()(uint4 a, uint4 b) const {
    return make_uint4(a.x * 31 + b.x, a.y * 37 + b.y, a.z * 41 + b.z, a.w * 43 + b.w);
  }
};

// One call: how many elements are combined and gathered.
struct Call {
  int reduced;
  int gathered;  // elements of a piece, or 0 for no gather
};

// Of call i, block b, all with the stride of the longest: what goes in, and what comes out.
template <typename T>
struct Arrays {
  const T* in;  // [calls, blocks, stride]
  T* reduced;   // [calls, blocks, stride]
  T* gathered;  // [calls, blocks, size, stride]
  int stride;
  int buffer_bytes;
};

// Blocks get out of step, and differently in each call.
__device__ void dawdle(int call) {
  const unsigned hash =
      (blockIdx.x * 2654435761u) ^ (static_cast<unsigned>(call) * 40503u * 65537u);
  if (hash % 3 == 0) __nanosleep(hash % 4096);
}

template <int kSize, typename T, typename Op>
__global__ void call_all(const Call* calls, int count, Way way, Arrays<T> arrays) {
  extern __shared__ __align__(16) char shared[];
  auto* control = reinterpret_cast<ClusterControl*>(shared);
  T* values = reinterpret_cast<T*>(shared + 16);
  char* buffer = shared + 16 + (arrays.stride * sizeof(T) + 15) / 16 * 16;
  ClusterExchange<kSize> exchange(control, buffer, arrays.buffer_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  for (int call = 0; call < count; ++call) {
    const auto row = static_cast<std::size_t>(call) * gridDim.x + blockIdx.x;
    const T* in = arrays.in + row * arrays.stride;
    const Call& now = calls[call];
    dawdle(call);
    for (int i = thread; i < now.reduced; i += threads) values[i] = in[i];
    const int words = (now.reduced * static_cast<int>(sizeof(T)) + 15) / 16;
    auto* vector = reinterpret_cast<uint4*>(values);
    if (way == Way::chosen)
      cluster_reduce(exchange, values, now.reduced, Op{});
    else if (way == Way::directly || words < kSize)
      exchange.template reduce_directly<T>(vector, words, Op{});
    else
      exchange.template reduce_in_slices<T>(vector, words, Op{});
    for (int i = thread; i < now.reduced; i += threads)
      arrays.reduced[row * arrays.stride + i] = values[i];
    if (now.gathered == 0) continue;
    __syncthreads();
    for (int i = thread; i < now.gathered; i += threads) values[i] = in[i];
    const T* all = cluster_gather(exchange, values, now.gathered);
    dawdle(call + count);
    for (int i = thread; i < kSize * now.gathered; i += threads) {
      const int rank = i / now.gathered;
      arrays.gathered[(row * kSize + rank) * arrays.stride + i % now.gathered] = all[i];
    }
  }
}

// An array on the device and its copy on the host.
template <typename T>
class Mirrored {
 public:
  explicit Mirrored(std::size_t count)
      : host_(count), device_(static_cast<std::int64_t>(count * sizeof(T)), "a test") {}
  T& operator[](std::size_t i) { return host_[i]; }
  std::vector<T>& host() { return host_; }
  T* device() const { return device_.template as<T>(); }
  void upload() {
    cuda::check(cudaMemcpy(device(), host_.data(), bytes(), cudaMemcpyHostToDevice), "writing");
  }
  void download() {
    cuda::check(cudaMemcpy(host_.data(), device(), bytes(), cudaMemcpyDeviceToHost), "reading");
  }
  // So that what nobody wrote is seen.
  void poison() { cuda::check(cudaMemset(device(), 0xff, bytes()), "poisoning"); }
  std::size_t bytes() const { return host_.size() * sizeof(T); }

 private:
  std::vector<T> host_;
  cuda::DeviceMemory device_;
};

void fill(std::mt19937& random, float& value) {
  value = std::normal_distribution<float>(0.0f, 3.0f)(random);
}
void fill(std::mt19937& random, SoftmaxState& value) {
  fill(random, value.maximum);
  value.sum = std::uniform_real_distribution<float>(1.0f, 9.0f)(random);
}
void fill(std::mt19937& random, uint4& value) {
  value = make_uint4(random(), random(), random(), random());
}

void expect_combined(float found, const std::vector<float>& inputs, Sum) {
  float exact = inputs[0];  // the same additions in the same order
  double wide = inputs[0], size = std::fabs(inputs[0]);
  for (std::size_t rank = 1; rank < inputs.size(); ++rank) {
    exact += inputs[rank];
    wide += inputs[rank];
    size += std::fabs(inputs[rank]);
  }
  EXPECT_EQ(found, exact);
  EXPECT_NEAR(found, wide, size * 1e-6);
}
void expect_combined(float found, const std::vector<float>& inputs, Max) {
  EXPECT_EQ(found, *std::max_element(inputs.begin(), inputs.end()));
}
void expect_combined(SoftmaxState found, const std::vector<SoftmaxState>& inputs, Merge) {
  float maximum = inputs[0].maximum;
  for (const SoftmaxState& state : inputs) maximum = std::max(maximum, state.maximum);
  double sum = 0;
  for (const SoftmaxState& state : inputs)
    sum += state.sum * std::exp2(static_cast<double>(state.maximum) - maximum);
  EXPECT_EQ(found.maximum, maximum);
  EXPECT_NEAR(found.sum, sum, sum * 1e-5);
}
void expect_combined(uint4 found, const std::vector<uint4>& inputs, Fold fold) {
  uint4 exact = inputs[0];
  for (std::size_t rank = 1; rank < inputs.size(); ++rank) exact = fold(exact, inputs[rank]);
  EXPECT_TRUE(std::memcmp(&found, &exact, sizeof(exact)) == 0);
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

constexpr int kClusters = 3;

// Runs the calls on a few clusters at once and checks every block's copy. With `way`, buffers are
// as large as that needs.
template <int kSize, typename T, typename Op>
void check_calls(const std::vector<Call>& calls, Way way, int threads) {
  int longest = 0, pieces = 0;
  for (const Call& call : calls) {
    longest = std::max({longest, call.reduced, call.gathered});
    pieces = std::max(pieces, call.gathered);
  }
  const int bytes = longest * static_cast<int>(sizeof(T));
  const int for_reduce =
      way == Way::chosen ? cluster_reduce_bytes<kSize>(bytes)
      : way == Way::directly
          ? cluster_reduce_directly_bytes<kSize>(bytes)
          : std::max(cluster_reduce_in_slices_bytes<kSize>(bytes),
                     cluster_reduce_directly_bytes<kSize>(std::min(bytes, 16 * kSize)));
  Arrays<T> arrays{};
  arrays.stride = longest;
  arrays.buffer_bytes =
      std::max(for_reduce, cluster_gather_bytes<kSize>(pieces * static_cast<int>(sizeof(T))));
  const std::size_t shared_bytes =
      16 + static_cast<std::size_t>((bytes + 15) / 16 * 16) + arrays.buffer_bytes;

  auto* kernel = call_all<kSize, T, Op>;
  int device = 0, most_shared = 0;
  ASSERT_EQ(cudaGetDevice(&device), cudaSuccess);
  ASSERT_EQ(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            cudaSuccess);
  if (shared_bytes > static_cast<std::size_t>(most_shared))
    GTEST_SKIP() << shared_bytes << " bytes of shared memory are more than this GPU has";
  ASSERT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            cudaSuccess);
  ASSERT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            cudaSuccess);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kSize;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kClusters * kSize);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int resident = 0;
  if (cudaOccupancyMaxActiveClusters(&resident, kernel, &config) != cudaSuccess || resident == 0) {
    cudaGetLastError();
    GTEST_SKIP() << "this GPU has no clusters of " << kSize << " blocks with " << shared_bytes
                 << " bytes of shared memory";
  }

  const std::size_t blocks = config.gridDim.x;
  const auto stride = static_cast<std::size_t>(longest);
  const std::size_t count = calls.size() * blocks * stride;
  Mirrored<Call> device_calls(calls.size());
  Mirrored<T> in(count), reduced(count), gathered(count * kSize);
  device_calls.host() = calls;
  std::mt19937 random(static_cast<unsigned>(kSize * 1000 + longest));
  for (T& value : in.host()) fill(random, value);
  device_calls.upload();
  in.upload();
  arrays.in = in.device();
  arrays.reduced = reduced.device();
  arrays.gathered = gathered.device();

  std::vector<T> first_reduced, first_gathered;
  constexpr int kRuns = 3;
  for (int run = 0; run < kRuns; ++run) {
    reduced.poison();
    gathered.poison();
    cuda::check(cudaLaunchKernelEx(&config, kernel, static_cast<const Call*>(device_calls.device()),
                                   static_cast<int>(calls.size()), way, arrays),
                "launching");
    cuda::check(cudaDeviceSynchronize(), "running the exchanges");
    reduced.download();
    gathered.download();
    if (run == 0) {
      first_reduced = reduced.host();
      first_gathered = gathered.host();
    }
    ASSERT_EQ(std::memcmp(&reduced[0], first_reduced.data(), reduced.bytes()), 0) << "run " << run;
    ASSERT_EQ(std::memcmp(&gathered[0], first_gathered.data(), gathered.bytes()), 0)
        << "run " << run;
  }

  for (std::size_t call = 0; call < calls.size(); ++call) {
    SCOPED_TRACE("call " + std::to_string(call));
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::size_t leader = block / kSize * kSize;
      const auto at = [&](std::size_t b, std::size_t i) {
        return (call * blocks + b) * stride + i;
      };
      for (int i = 0; i < calls[call].reduced; ++i) {
        const auto element = static_cast<std::size_t>(i);
        const T found = reduced[at(block, element)];
        ASSERT_TRUE(same_bits(found, reduced[at(leader, element)]))
            << "element " << i << " of block " << block << " and of block " << leader;
        if (block != leader) continue;
        std::vector<T> inputs;
        for (int rank = 0; rank < kSize; ++rank) inputs.push_back(in[at(leader + rank, element)]);
        expect_combined(found, inputs, Op{});
        if (testing::Test::HasFailure()) FAIL() << "element " << i << " of block " << block;
      }
      for (int rank = 0; rank < kSize; ++rank)
        for (int i = 0; i < calls[call].gathered; ++i)
          ASSERT_TRUE(same_bits(gathered[((call * blocks + block) * kSize + rank) * stride +
                                         static_cast<std::size_t>(i)],
                                in[at(leader + rank, static_cast<std::size_t>(i))]))
              << "element " << i << " of rank " << rank << "'s piece in block " << block;
    }
  }
}

// Long and short ones in turn, so that a word of the wrong exchange is seen; pieces of all
// alignments.
std::vector<Call> mixed_calls() {
  std::vector<Call> calls;
  for (const int reduced : {1, 2, 3, 1000, 4, 31, 1, 63, 64, 65, 640, 5, 1000, 1000, 257})
    calls.push_back({reduced, calls.size() % 3 == 2 ? 0 : std::min(reduced, 200) + 1});
  return calls;
}

// 4-byte elements in vectors of at most 1 KB or so, for clusters in which more does not fit.
std::vector<Call> short_calls() {
  std::vector<Call> calls;
  for (int i = 0; i < 40; ++i) calls.push_back({1 + (i * 37) % 130, i % 2 == 0 ? 1 + i : 0});
  return calls;
}

template <int kSize, typename T, typename Op>
void check_all_ways(const std::vector<Call>& calls) {
  for (const Way way : {Way::chosen, Way::directly, Way::in_slices}) {
    for (const int threads : {256, 96}) {
      SCOPED_TRACE("way " + std::to_string(static_cast<int>(way)) + ", " + std::to_string(threads) +
                   " threads");
      check_calls<kSize, T, Op>(calls, way, threads);
      if (testing::Test::HasFatalFailure() || testing::Test::IsSkipped()) return;
    }
  }
}

class Cluster : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    int count = 0, device = 0, major = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(cudaGetDevice(&device), cudaSuccess);
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
              cudaSuccess);
    if (major < 9) GTEST_SKIP() << "clusters need compute capability 9.0";
  }

  template <typename T, typename Op>
  void check(const std::vector<Call>& calls) {
    switch (GetParam()) {
      case 1: return check_all_ways<1, T, Op>(calls);
      case 2: return check_all_ways<2, T, Op>(calls);
      case 4: return check_all_ways<4, T, Op>(calls);
      case 8: return check_all_ways<8, T, Op>(calls);
      case 16: return check_all_ways<16, T, Op>(calls);
    }
    FAIL() << "no kernels for clusters of " << GetParam();
  }
};

TEST_P(Cluster, Sums) { check<float, Sum>(mixed_calls()); }
TEST_P(Cluster, Maxima) { check<float, Max>(short_calls()); }
TEST_P(Cluster, SoftmaxStates) { check<SoftmaxState, Merge>(short_calls()); }
TEST_P(Cluster, KeepsTheOrderOfRanks) { check<uint4, Fold>(short_calls()); }

// One cluster size at a time; 16 blocks are more than every GPU of this kind must have.
INSTANTIATE_TEST_SUITE_P(OfSize, Cluster, testing::Values(1, 2, 4, 8, 16),
                         [](const auto& info) { return std::to_string(info.param); });

// A vector of the size of Pythia-2.8B's hidden state, in which a piece is each block's share.
TEST(ClusterOfFour, TakesAHiddenState) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
  const std::vector<Call> calls(6, Call{2560, 640});
  check_calls<4, float, Sum>(calls, Way::chosen, 256);
}

}  // namespace
}  // namespace clusterfusion::test
