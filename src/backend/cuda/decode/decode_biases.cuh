// Brings biases: one thread of each block that follows the ring's announcements and copies the
// biases of a chunk's rows behind the chunk, while the chunk itself is on its way. Consumers who
// had to fetch them would wait for them behind the weights.
#pragma once

#include "backend/cuda/decode/decode_common.cuh"

namespace clusterfusion::cuda {

class BiasFetcher {
 public:
  __device__ __forceinline__ BiasFetcher(const DecodeParams& params, SharedControl* shared,
                                         char* ring_data)
      : p(params),
        control(shared),
        ring(&shared->ring, ring_data, params.stages, params.stage_bytes) {}

  // Until the ring ends. Epoch e is of layer e % `epochs`.
  __device__ __forceinline__ void run(int epochs) {
    for (int id = ring.announced(); id != kRingEnd; id = ring.announced()) {
      const auto stream = static_cast<Stream>(stream_of(id));
      add(control->matrices[stream_of(id)], biases_of(epoch_of(id) % epochs, stream));
    }
  }

 private:
  __device__ __forceinline__ const char* biases_of(int layer, Stream stream) const {
    const StreamedLayer& first = p.first_layer;
    const char* of_first = nullptr;
    switch (stream) {
      case Stream::qkv: of_first = first.qkv_bias; break;
      case Stream::mlp_up: of_first = first.mlp_up_bias; break;
      case Stream::mlp_down: of_first = first.mlp_down_bias; break;
      case Stream::attention_out: of_first = first.attention_out_bias; break;
      default: break;
    }
    return of_first == nullptr ? nullptr : of_layer(p, of_first, layer);
  }

  // From the 16 bytes that the first of the chunk's biases lies in to those of the last: there are
  // a multiple of 16 bytes of biases.
  __device__ __forceinline__ void add(const StreamedMatrix& matrix, const char* biases) {
    if (biases == nullptr) return ring.add(0, nullptr, 0);
    const int first_row = ring.label().index * matrix.rows_per_chunk;
    const int end_row = min(first_row + matrix.rows_per_chunk, matrix.rows);
    const int begin = first_row * p.bias_element_bytes & ~15;
    const int end = (end_row * p.bias_element_bytes + 15) & ~15;
    ring.add(p.bias_offset, biases + begin, end - begin);
  }

  const DecodeParams& p;
  SharedControl* control;
  RingFollower ring;
};

}  // namespace clusterfusion::cuda
