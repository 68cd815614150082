// What the kernels of GPUs compute of what the layer calls take.
#pragma once

#include "backend/layer_ops.hpp"

namespace clusterfusion::ops {

// The task of checked work. Errors: unsupported, with the option's name, for what only the CPU
// computes.
LayerTask gpu_task(const LayerWork& work);

}  // namespace clusterfusion::ops
