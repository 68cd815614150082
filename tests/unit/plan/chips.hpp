#pragma once

#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {

struct Chip {
  const char* name;
  DeviceLimits limits;  // multiprocessors, and bytes of shared memory that a block may have
};

// Shared memory by compute capability as in "Technical Specifications per Compute Capability" of
// the CUDA C++ Programming Guide: 163 KiB (8.0), 99 KiB (8.6, 8.9, 12.0), 227 KiB (9.0, 10.0).
inline constexpr Chip kChips[] = {
    {"A100", {108, 163 * 1024}}, {"RTX3090", {82, 99 * 1024}}, {"RTX4090", {128, 99 * 1024}},
    {"L4", {58, 99 * 1024}},     {"L40S", {142, 99 * 1024}},   {"H100", {132, 227 * 1024}},
    {"H20", {78, 227 * 1024}},   {"B200", {148, 227 * 1024}},  {"RTX5090", {170, 99 * 1024}},
};
inline constexpr DeviceLimits kHopper{132, 227 * 1024};

}  // namespace clusterfusion::plan
