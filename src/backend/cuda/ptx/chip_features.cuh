// What code may use of the chip that it is compiled for.
//
// With CLUSTERFUSION_ASYNC_COPIES (CMake: CLUSTERFUSION_CUDA_COPY=async) code for any chip takes
// the ways of those before compute capability 9.0, so that these can be tested on later ones.
#pragma once

namespace clusterfusion::device {

#if defined(CLUSTERFUSION_ASYNC_COPIES) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
// Compute capability 9.0 and later: bulk copies (cp.async.bulk), also by tensor maps, with barriers
// that count their bytes; clusters; programmatic dependent launch.
inline constexpr bool kBulkCopies = false;
#define CLUSTERFUSION_CLUSTER(blocks)
#else
inline constexpr bool kBulkCopies = true;
#define CLUSTERFUSION_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#endif
// CLUSTERFUSION_CLUSTER(blocks), in front of a kernel's name: blocks that make up a cluster.
// Without clusters each is one by itself (cluster.cuh).

// What is sm_90a's alone: products of warpgroups (wgmma) and, as it is used here, moving registers
// (setmaxnreg). The host's compilation sees the code for all chips.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kWarpgroups = kBulkCopies;
#else
inline constexpr bool kWarpgroups = false;
#endif

}  // namespace clusterfusion::device
