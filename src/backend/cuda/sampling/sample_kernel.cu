// One cluster of blocks chooses one token; without clusters, one block.
//
// Each block has a slice of the vocabulary, in the order of the ids; a thread takes groups of four
// tokens, which share the words of their noise. `scratch` holds the penalised logits, later the
// scores of the tokens that are still in; each of its groups is one thread's own.
#include <cstdint>
#include <limits>
#include <type_traits>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/sampling/cluster_work.cuh"
#include "backend/cuda/sampling/device_arithmetic.cuh"
#include "backend/cuda/sampling/sample_kernel.hpp"
#include "sampling/philox.hpp"
#include "sampling/token_score.hpp"
#include "sampling/weight.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kNoLimit = std::numeric_limits<std::int32_t>::max();

// The largest of some values, and the lowest id among equals.
template <typename Value>
struct Best {
  Value value;
  std::conditional_t<sizeof(Value) == 8, std::int64_t, std::int32_t> token;  // no padding

  __device__ __forceinline__ friend Best better(const Best& a, const Best& b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token) ? a : b;
  }
};

// Of all logits.
struct Summary {
  Best<float> best;       // after the penalty
  float maximum;          // before it
  std::int32_t unusable;  // a NaN or +inf
};

struct Shared {
  SelectMemory select;
  TieMemory ties;
  ReduceMemory<Summary> summary;
  ReduceMemory<double> sum;
  ReduceMemory<Best<double>> drawn;
  std::int32_t top_count;
  Best<float> top[kMaxLogprobs];
};

// The tokens that are not behind a selection: smaller keys, and of equal ones the lowest ids.
struct Cut {
  std::uint32_t key = 0xffffffffu;
  std::int32_t last_tied = kNoLimit;
  __device__ __forceinline__ bool keeps(std::uint32_t other, std::int32_t token) const {
    return other < key || (other == key && token <= last_tied);
  }
};

class ClusterSampler {
 public:
  __device__ __forceinline__ ClusterSampler(const SampleParams& params, Shared& memory)
      : p(params), shared(memory) {
    const int groups = (p.vocab_size + 3) / 4;
    const int slice = (groups + kSampleBlocks - 1) / kSampleBlocks;
    begin = min(static_cast<int>(cluster_rank()) * slice, groups);
    end = min(begin + slice, groups);
  }

  __device__ __forceinline__ void run() {
    init_select(shared.select);
    if (threadIdx.x == 0) shared.top_count = 0;
    const Summary summary = summarise();
    std::int32_t token = -1;
    float logprob = 0.0f;
    if (summary.unusable == 0 && summary.best.value > -kInfinity) {
      token = p.temperature == 0.0f ? summary.best.token : draw(summary.best.value);
      if (p.num_logprobs >= 0) logprob = log_probabilities(summary.maximum, token);
    }
    // Behind a barrier that all blocks reached after their last look at `seen`: draw()'s, or for
    // greedy summarise()'s.
    if (cluster_rank() == 0 && threadIdx.x == 0) {
      p.result->token = token;
      p.result->logprob = logprob;
      if (p.seen != nullptr && token >= 0) p.seen[token / 32] |= 1u << token % 32;
    }
    cluster_barrier();
  }

 private:
  // Four tokens' logits as the model gave them; -inf behind the vocabulary's end.
  __device__ __forceinline__ float4 raw_logits(int group) const {
    if (4 * group + 3 < p.vocab_size)
      return __ldg(reinterpret_cast<const float4*>(p.logits) + group);
    const auto at = [&](int i) {
      return 4 * group + i < p.vocab_size ? __ldg(p.logits + 4 * group + i) : -kInfinity;
    };
    return make_float4(at(0), at(1), at(2), at(3));
  }

  __device__ __forceinline__ float penalized(int token, float logit) const {
    if (p.seen == nullptr || (p.seen[token / 32] >> token % 32 & 1u) == 0) return logit;
    return penalized_logit(logit, p.repetition_penalty);
  }

  __device__ __forceinline__ float4* scratch() const {
    return reinterpret_cast<float4*>(p.scratch);
  }

  // Calls f(group) for each of this thread's groups.
  template <typename F>
  __device__ __forceinline__ void for_each_group(F f) const {
#pragma unroll 1
    for (int group = begin + static_cast<int>(threadIdx.x); group < end; group += kSampleThreads)
      f(group);
  }

  // f(key_of(value)) for each of four values.
  template <typename KeyOf, typename F>
  __device__ __forceinline__ static void each_of(const float4& values, KeyOf key_of, F f) {
    f(key_of(values.x));
    f(key_of(values.y));
    f(key_of(values.z));
    f(key_of(values.w));
  }

  // Fills the scratch.
  __device__ __forceinline__ Summary summarise() {
    Summary own{{-kInfinity, kNoLimit}, -kInfinity, 0};
    for_each_group([&](int group) {
      const float4 four = raw_logits(group);
      const float raw[4] = {four.x, four.y, four.z, four.w};
      float logits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 4 * group + i;
        logits[i] = token < p.drawable_vocab_size ? penalized(token, raw[i]) : -kInfinity;
        own.unusable |= raw[i] <= std::numeric_limits<float>::max() ? 0 : 1;  // false for NaN
        own.maximum = fmaxf(own.maximum, raw[i]);
        own.best = better(own.best, Best<float>{logits[i], token});
      }
      scratch()[group] = make_float4(logits[0], logits[1], logits[2], logits[3]);
    });
    return combine_cluster(shared.summary, own, [](const Summary& a, const Summary& b) {
      return Summary{better(a.best, b.best), fmaxf(a.maximum, b.maximum), a.unusable | b.unusable};
    });
  }

  // ---------------------------------------------------------------- drawing

  __device__ __forceinline__ std::int32_t draw(float maximum) {
    score_tokens(maximum);
    return largest_noisy_score(p.top_p < 1.0f ? cut_top_p() : Cut{});
  }

  // Scratch: from logits to scores, -inf for tokens that temperature and top-k drop.
  __device__ __forceinline__ void score_tokens(float maximum) {
    std::uint32_t last_key = 0xffffffffu;
    if (p.top_k > 0 && p.top_k < p.vocab_size) last_key = top_k_key();
    for_each_group([&](int group) {
      const float4 logits = scratch()[group];
      const auto score = [&](float logit) {
        return logit_key(logit) <= last_key ? token_score(logit, maximum, p.temperature)
                                            : -kInfinity;
      };
      scratch()[group] =
          make_float4(score(logits.x), score(logits.y), score(logits.z), score(logits.w));
    });
  }

  // Of the k-th largest logit, or up to the next token's.
  __device__ __forceinline__ std::uint32_t top_k_key() {
    return select_first(static_cast<std::uint64_t>(p.top_k),
                        [&](int group) { return scratch()[group]; })
        .key;
  }

  // The `wanted` largest of the logits that logits_of(group) gives.
  template <typename LogitsOf>
  __device__ __forceinline__ Selection select_first(std::uint64_t wanted, LogitsOf logits_of) {
    const auto one = [](std::uint32_t) { return std::uint64_t{1}; };
    return select(
        shared.select, turn,
        [&](auto f) {
          for_each_group([&](int group) { each_of(logits_of(group), logit_key, f); });
        },
        one, one, [wanted](std::uint64_t sum, std::uint64_t) { return sum >= wanted; });
  }

  __device__ __forceinline__ Cut cut_top_p() {
    const auto weight = [](std::uint32_t key) {
      return weight_with<DeviceArithmetic>(score_of_key(key));
    };
    // A larger key weighs at most one more: weights lie within 0.51 of what falls as keys grow.
    const auto least_weight = [&](std::uint32_t key) {
      const std::uint64_t own = weight(key);
      return own > 0 ? own - 1 : 0;
    };
    const float top_p = p.top_p;
    const auto reached = [top_p](std::uint64_t sum, std::uint64_t total) {
      return reaches_top_p(sum, total, top_p);
    };
    const Selection last = select(
        shared.select, turn,
        [&](auto f) {
          for_each_group([&](int group) { each_of(scratch()[group], score_key, f); });
        },
        weight, least_weight, reached);
    Cut cut{last.key, kNoLimit};
    if (!last.complete) {
      const std::uint64_t each = weight(last.key);
      const std::uint64_t needed =
          ties_needed(last.before, each, last.at / each,
                      [&](std::uint64_t sum) { return reached(sum, last.total); });
      cut.last_tied = find_tied(shared.ties, begin, end, static_cast<std::uint32_t>(needed),
                                [&](int token) { return score_key(p.scratch[token]) == last.key; });
    }
    return cut;
  }

  __device__ __forceinline__ std::int32_t largest_noisy_score(const Cut& cut) {
    Best<double> best{-std::numeric_limits<double>::infinity(), kNoLimit};
    for_each_group([&](int group) {
      const float4 four = scratch()[group];
      const float scores[4] = {four.x, four.y, four.z, four.w};
      bool kept[4];
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        kept[i] = scores[i] > -kInfinity && cut.keeps(score_key(scores[i]), 4 * group + i) &&
                  !(static_cast<double>(scores[i]) < p.lowest_score);
        any = any || kept[i];
      }
      if (!any) return;
      const PhiloxCounter words =
          noise_words(p.seed, p.position, static_cast<std::uint32_t>(group));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!kept[i]) continue;
        const int token = 4 * group + i;
        const float logit = penalized(token, __ldg(p.logits + token));
        best = better(best, Best<double>{noisy_score(logit, p.temperature, words[i]), token});
      }
    });
    best = combine_cluster(shared.drawn, best, [](const Best<double>& a, const Best<double>& b) {
      return better(a, b);
    });
    return static_cast<std::int32_t>(best.token);
  }

  // ---------------------------------------------------------------- log-probabilities

  // Writes those of the likeliest tokens, and returns the chosen one's.
  __device__ __forceinline__ float log_probabilities(float maximum, std::int32_t token) {
    double sum = 0.0;
    for_each_group([&](int group) {
      const float4 logits = raw_logits(group);
      sum += (static_cast<double>(expf(logits.x - maximum)) + expf(logits.y - maximum)) +
             (static_cast<double>(expf(logits.z - maximum)) + expf(logits.w - maximum));
    });
    sum = combine_cluster(shared.sum, sum, [](double a, double b) { return a + b; });
    const double log_sum = log(sum);
    const auto logprob = [&](float logit) {
      return static_cast<float>(static_cast<double>(logit) - static_cast<double>(maximum) -
                                log_sum);
    };
    const int count = min(p.num_logprobs, p.vocab_size);
    if (count > 0) {
      gather_likeliest(count);
      if (cluster_rank() == 0) write_in_order(count, logprob);
    }
    return logprob(__ldg(p.logits + token));
  }

  // The `count` likeliest tokens into the first block's list, in no particular order.
  __device__ __forceinline__ void gather_likeliest(int count) {
    const auto wanted = static_cast<std::uint64_t>(count);
    const Selection last = select_first(wanted, [&](int group) { return raw_logits(group); });
    Cut cut{last.key, kNoLimit};
    // What lies behind the vocabulary's end may be tied, but has the highest ids.
    if (!last.complete) {
      const auto needed = static_cast<std::uint32_t>(wanted - last.before);
      cut.last_tied = find_tied(shared.ties, begin, end, needed, [&](int token) {
        return token < p.vocab_size && logit_key(__ldg(p.logits + token)) == last.key;
      });
    }
    for_each_group([&](int group) {
      const float4 four = raw_logits(group);
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!cut.keeps(logit_key(logits[i]), 4 * group + i)) continue;
        const std::int32_t slot = atomicAdd(of_block(&shared.top_count, 0), 1);
        *of_block(&shared.top[slot], 0) = Best<float>{logits[i], 4 * group + i};
      }
    });
    cluster_barrier();
  }

  // The first block's list, each entry to where as many are better.
  template <typename Logprob>
  __device__ __forceinline__ void write_in_order(int count, Logprob logprob) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= count) return;
    const Best<float> own = shared.top[i];
    int rank = 0;
    for (int other = 0; other < count; ++other)
      if (other != i && better(shared.top[other], own).token != own.token) ++rank;
    p.result->top[rank] = {own.token, logprob(own.value)};
  }

  const SampleParams& p;
  Shared& shared;
  int begin, end;  // this block's groups
  int turn = 0;    // of select()
};

__global__ void CLUSTERFUSION_CLUSTER(kSampleBlocks) __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ SampleParams params) {
  __shared__ Shared shared;
  ClusterSampler(params, shared).run();
}

}  // namespace

void launch_sample(const SampleParams& params, cudaStream_t stream) {
  const unsigned blocks = has_bulk_copies() ? kClusterBlocks : 1;
  sample_kernel<<<blocks, kSampleThreads, 0, stream>>>(params);
  check(cudaGetLastError(), "starting the sampling kernel");
}

}  // namespace clusterfusion::cuda
