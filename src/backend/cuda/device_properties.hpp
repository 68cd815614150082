// What a device has, as this build makes use of it.
//
// A build with CLUSTERFUSION_CUDA_COPY=async sees every device as one of compute capability 8.0,
// one with CLUSTERFUSION_CUDA_COPY=bulk as one of 12.0: with no more shared memory for a block than
// that has (163 and 99 KiB), and without what it does not have. So the ways of these chips are
// tested on Hopper. CLUSTERFUSION_SHARED_KIB in the environment of such a build is another limit:
// 99 is that of 8.6 and 8.9.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace clusterfusion::cuda {

// Errors: those of CUDA; invalid_argument if CLUSTERFUSION_SHARED_KIB is no number from 16 to 227.
cudaDeviceProp device_properties(int device);
// Of the current device.
cudaDeviceProp device_properties();

// Bulk copies, also by tensor maps; clusters; dependent launches.
inline constexpr int kFirstWithBulkCopies = 9;  // major number of the compute capability
inline bool has_bulk_copies(const cudaDeviceProp& properties) {
  return properties.major >= kFirstWithBulkCopies;
}
// Products of warpgroups, and registers that move between them.
inline bool has_warpgroups(const cudaDeviceProp& properties) { return properties.major == 9; }
// Whether weights of so many bytes are gone from L2 when they are read again.
inline bool exceed_l2(std::int64_t bytes, const cudaDeviceProp& properties) {
  return bytes > properties.l2CacheSize;
}
// has_bulk_copies() of the current device, at the price of a look into a table.
bool has_bulk_copies();

// Why this build has no code for a device, and what to do: "NVIDIA A10 has compute capability 8.6;
// ...". Empty if it has. Errors: those of CUDA.
std::string no_code_because(int device);

}  // namespace clusterfusion::cuda
