// A CUDA graph of work that otherwise goes to a stream launch by launch.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <type_traits>

namespace clusterfusion::cuda {

class CapturedGraph {
 public:
  // Captures what `work` puts on the stream that it is given, and on streams that it forks from
  // there and joins again; nothing runs. Memory that the work names must outlive the graph. Errors:
  // those of `work` and of CUDA; no stream is left in capture mode by them.
  explicit CapturedGraph(const std::function<void(cudaStream_t)>& work);

  void launch(cudaStream_t stream) const;

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy> executable_;
};

}  // namespace clusterfusion::cuda
