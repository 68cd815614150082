// Operand A of the products: input vectors of the rows, in registers.
//
// A tile has 8 operand rows. If there are fewer rows to compute, several input vectors lie side by
// side: operand row o is row o % rows of the vector in slot o / rows. Of a product's results those
// of one slot are used.
//
// Lane (g, q) has of operand row g the elements 32 i + 8 q .. + 7 of its warp's share: 16 bytes, as
// many as it loads of the matrix, and the tensor cores take them as they come. Words 0 and 2 (in
// operand_order: elements 0, 1 and 2, 3) are row g of m16n8k16, words 1 and 3 (elements 4, 5 and 6,
// 7) row g + 8. So of a product with a weight's first two words rows 0 to 7 are used, and of one
// with its last two rows 8 to 15.
#pragma once

#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

template <int kOperandRows, int kPieces>
class Activations {
 public:
  static_assert(kOperandRows % 8 == 0);
  static constexpr int kTiles = kOperandRows / 8;
  static constexpr int kSteps = plan::kMaxPieceIterations;

  uint4 operand[kTiles][kPieces][kSteps];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int i = 0; i < kSteps; ++i) operand[t][piece][i] = make_uint4(0, 0, 0, 0);
  }

  // Where a lane's shares come from: of operand rows 8 t + g, all cut alike.
  struct Sources {
    static constexpr int kNone = -1;
    const char* base;
    int offset[kTiles];  // of the first 16 bytes, or kNone
    int pieces, piece_bytes;
    int steps;  // of a piece
    __device__ __forceinline__ bool has(int t, int piece, int i) const {
      return offset[t] != kNone && piece < pieces && i < steps;
    }
    __device__ __forceinline__ const char* at(int t, int piece, int i) const {
      return base + (offset[t] + piece * piece_bytes) + i * (plan::kStepColumns * 2);
    }
  };

  // Waits for one element of each row that `sources` name: what comes from one SM comes together,
  // and asking for all of it again and again would hold up the weights. For whole warps.
  __device__ __forceinline__ void await_first(const Sources& sources) const {
    bool missing = true;
    while (__any_sync(kAllLanes, missing)) {
      missing = false;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        if (sources.has(t, 0, 0))
          missing |= any_half_not_ready(lamport_load_4(sources.at(t, 0, 0)));
    }
  }

  // Loads all that `sources` name, from Lamport buffers, when it is there. For whole warps.
  __device__ __forceinline__ void await(const Sources& sources) {
    bool missing = true;
    load(sources, [](const char* from) { return lamport_load_4(from); });
    while (__any_sync(kAllLanes, missing)) {
      missing = false;
      for_each([&](int t, int piece, int i) {
        if (!sources.has(t, piece, i) || !any_half_not_ready(operand[t][piece][i])) return;
        missing = true;
        operand[t][piece][i] = lamport_load_4(sources.at(t, piece, i));
      });
    }
  }

  // Loads all that `sources` name; what lies behind a source's end becomes zero.
  template <typename Load>
  __device__ __forceinline__ void load(const Sources& sources, Load&& load) {
    for_each([&](int t, int piece, int i) {
      if (sources.offset[t] == Sources::kNone) return;
      operand[t][piece][i] = make_uint4(0, 0, 0, 0);
      if (sources.has(t, piece, i)) operand[t][piece][i] = load(sources.at(t, piece, i));
    });
  }

 private:
  template <typename Body>
  __device__ __forceinline__ void for_each(Body&& body) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int i = 0; i < kSteps; ++i) body(t, piece, i);
  }
};

}  // namespace clusterfusion::cuda::stream
