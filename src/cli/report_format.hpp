// Figures as a person reads them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {

// Three significant digits: "35.1 ms", "1.53 s"; from 100 s on "2 min 5 s", "1 h 2 min".
std::string format_duration(double seconds);
// Decimal units: "14.9 MB", "5.55 GB".
std::string format_bytes(double bytes);
// "1 token", "1,024 tokens".
std::string format_count(std::int64_t count, std::string_view unit);

// "cuda, NVIDIA H100 80GB HBM3, 132 SMs (a supported GPU is there)".
std::string format_device(const EngineInfo& info);

// The statistics of one generation, as one to two lines that end in a newline:
//   prompt: 12 tokens, first token after 35.1 ms
//   output: 128 tokens (token_limit), 12.0 ms/token, 83.3 tokens/s, 9.80 GB/s, 87 % of the read
//   ceiling of 11.3 GB/s
std::string format_statistics(const Statistics& statistics, std::string_view finish_reason);

}  // namespace clusterfusion::cli
