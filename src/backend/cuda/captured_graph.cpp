#include "backend/cuda/captured_graph.hpp"

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {
namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

// A stream in capture mode. It is one of its own: the caller's may be the default stream, which
// cannot be captured.
class Capture {
 public:
  Capture() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
    // Relaxed: what other threads may do meanwhile stays as it is, and what the work does besides
    // launching, such as loading a kernel, is no part of the graph.
    const cudaError_t error = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed);
    if (error != cudaSuccess) cudaStreamDestroy(stream_);
    check(error, "beginning a capture");
    capturing_ = true;
  }
  ~Capture() {
    if (capturing_) {
      cudaGraph_t broken = nullptr;
      cudaStreamEndCapture(stream_, &broken);
      if (broken != nullptr) cudaGraphDestroy(broken);
      cudaGetLastError();  // the error that led here is on its way already
    }
    cudaStreamDestroy(stream_);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  cudaStream_t stream() const noexcept { return stream_; }

  Graph end() {
    capturing_ = false;
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(stream_, &graph);
    Graph owner(graph);
    check(error, "ending a capture");
    return owner;
  }

 private:
  cudaStream_t stream_ = nullptr;
  bool capturing_ = false;
};

Graph capture(const std::function<void(cudaStream_t)>& work) {
  Capture capture;
  work(capture.stream());
  return capture.end();
}

}  // namespace

CapturedGraph::CapturedGraph(const std::function<void(cudaStream_t)>& work) {
  const Graph graph = capture(work);
  cudaGraphExec_t executable = nullptr;
  check(cudaGraphInstantiate(&executable, graph.get(), 0), "instantiating a graph");
  executable_.reset(executable);
}

void CapturedGraph::launch(cudaStream_t stream) const {
  check(cudaGraphLaunch(executable_.get(), stream), "launching a graph");
}

}  // namespace clusterfusion::cuda
