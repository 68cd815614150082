// Marks a function that a GPU's kernels call as well.
#pragma once

#ifdef __CUDACC__
#define CF_HOST_DEVICE __host__ __device__
#else
#define CF_HOST_DEVICE
#endif
