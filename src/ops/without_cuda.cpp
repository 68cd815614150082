// The layer calls on CUDA tensors, of a build without CUDA.
#include "backend/layer_ops.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

[[noreturn]] void refuse(const LayerStream& stream) {
  fail(ErrorKind::unsupported,
       "the tensors are on cuda:{}, but this build has no CUDA kernels; move the tensors to the "
       "CPU, or build ClusterFusion where there is a CUDA toolkit",
       stream.device_id);
}

}  // namespace

void run_layer(const LayerWork&, const LayerStream& stream) { refuse(stream); }

}  // namespace clusterfusion::cuda
