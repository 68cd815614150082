// From a plan to the parameters of kernels for many rows.
#pragma once

#include "backend/cuda/device_model.hpp"
#include "backend/cuda/stream/stream_params.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

// All of StreamParams that is the model's alone.
StreamParams describe_model(const ModelConfig& config, const plan::ProductCuts& cuts,
                            const plan::KvPlan& kv, const DeviceModel& weights,
                            std::int32_t sm_count);

RowsLayout rows_layout(const ModelConfig& config, const plan::ProductCuts& cuts,
                       std::int32_t sm_count, std::int32_t rows);

}  // namespace clusterfusion::cuda
