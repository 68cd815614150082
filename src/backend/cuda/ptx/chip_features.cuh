// What code may use of the chip that it is compiled for.
//
// With CLUSTERFUSION_AS_CHIP (CMake: CLUSTERFUSION_CUDA_COPY) it takes the ways of another chip,
// 800 for compute capability 8.0 and 1200 for 12.0, so that these can be tested on Hopper.
#pragma once

namespace clusterfusion::device {

#if defined(CLUSTERFUSION_AS_CHIP)
#define CLUSTERFUSION_CHIP CLUSTERFUSION_AS_CHIP
#elif defined(__CUDA_ARCH__)
#define CLUSTERFUSION_CHIP __CUDA_ARCH__
#else
#define CLUSTERFUSION_CHIP 900  // the host's compilation
#endif

// Compute capability 9.0 and later: bulk copies (cp.async.bulk), also by tensor maps, with barriers
// that count their bytes; clusters; programmatic dependent launch.
inline constexpr bool kBulkCopies = CLUSTERFUSION_CHIP >= 900;

// In front of a kernel's name: so many blocks make up a cluster. Without clusters each block is one
// by itself (cluster.cuh).
#if CLUSTERFUSION_CHIP >= 900
#define CLUSTERFUSION_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTERFUSION_CLUSTER(blocks)
#endif

// What is sm_90a's alone: products of warpgroups (wgmma) and, as it is used here, moving registers
// (setmaxnreg).
#if defined(CLUSTERFUSION_AS_CHIP)
inline constexpr bool kWarpgroups = false;
#elif !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kWarpgroups = true;
#else
inline constexpr bool kWarpgroups = false;
#endif

}  // namespace clusterfusion::device
