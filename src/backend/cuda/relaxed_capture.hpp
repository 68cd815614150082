// Work that must be done, once, while somebody captures a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {

// While any stream is captured, a thread may not allocate, free or load a kernel, unless it says
// that it knows what it does: such calls are no part of the graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "relaxing capture"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace clusterfusion::cuda
