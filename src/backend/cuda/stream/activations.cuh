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

  // Where a lane's shares come from: of operand rows 8 t + g, all cut alike. From step to step of
  // its vector it is as far as kVectors vectors side by side are wide.
  template <int kVectors>
  struct Sources {
    static constexpr int kStepBytes = kVectors * plan::kStepColumns * 2;
    const char* base;
    int offset[kTiles];  // of the first 16 bytes, or kNone
    int pieces, piece_steps;
    int steps;  // of a piece, this warp's
    // Steps of a piece that operand row 8 t + g has.
    __device__ __forceinline__ int steps_of(int t, int piece) const {
      return offset[t] != kNone && piece < pieces ? steps : 0;
    }
    __device__ __forceinline__ bool has(int t, int piece, int i) const {
      return i < steps_of(t, piece);
    }
    __device__ __forceinline__ const char* at(int t, int piece, int i) const {
      return base + (offset[t] + piece * piece_steps * kStepBytes) + i * kStepBytes;
    }
  };
  static constexpr int kNone = -1;
  // Of Lamport buffers (input_place()).
  using LamportSources = Sources<kOperandRows>;

  // Waits for one element of each row that `sources` name: what comes from one SM comes together,
  // and asking for all of it again and again would hold up the weights. For whole warps.
  __device__ __forceinline__ void await_first(const LamportSources& sources) const {
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
  __device__ __forceinline__ void await(const LamportSources& sources) {
    load(sources,
         [](uint4& to, const char* from, bool is_there) { lamport_load_4_if(to, from, is_there); });
    while (__any_sync(kAllLanes, is_any_missing()))
      for_each([&](int t, int piece, int i) {
        if (sources.has(t, piece, i) && any_half_not_ready(operand[t][piece][i]))
          operand[t][piece][i] = lamport_load_4(sources.at(t, piece, i));
      });
  }

  // Loads all that `sources` name; what lies behind a source's end becomes zero. `load_if`: into a
  // uint4 from an address, if the last argument says so.
  template <int kVectors, typename LoadIf>
  __device__ __forceinline__ void load(const Sources<kVectors>& sources, LoadIf&& load_if) {
    if (sources.pieces < kPieces || sources.steps < kSteps)
      for_each([&](int t, int piece, int i) {
        if (sources.offset[t] != kNone) operand[t][piece][i] = make_uint4(0, 0, 0, 0);
      });
    for_each([&](int t, int piece, int i) {
      load_if(operand[t][piece][i], sources.at(t, piece, i), sources.has(t, piece, i));
    });
  }

 private:
  // An element that is not ready is greater than any other: one look at all of them is much
  // quicker than one at each.
  __device__ __forceinline__ bool is_any_missing() const {
    std::uint32_t greatest = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int i = 0; i < kSteps; ++i) greatest = greatest_halves(greatest, operand[t][piece][i]);
    return half_not_ready(greatest) != 0;
  }
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
