// SMs of the GPU that a kernel of another stream holds: what is launched meanwhile gets the others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace clusterfusion::test {

class HeldSms {
 public:
  // Returns when a block with all of an SM's shared memory runs on each of so many SMs. They hold
  // these until end(), but for at most ten seconds. Throws an Error if that cannot be had.
  explicit HeldSms(int count);
  ~HeldSms();
  HeldSms(const HeldSms&) = delete;
  HeldSms& operator=(const HeldSms&) = delete;

  // Whether they are held still.
  bool held() const;
  void end();

 private:
  void release();

  cudaStream_t stream_ = nullptr;
  // In host memory that the GPU sees: how many blocks run, and whether they are to end.
  volatile std::uint32_t* flags_ = nullptr;
};

}  // namespace clusterfusion::test
