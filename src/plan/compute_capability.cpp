#include "plan/compute_capability.hpp"

#include <fmt/ranges.h>

#include <charconv>
#include <optional>
#include <vector>

namespace clusterfusion::plan {
namespace {

struct Architecture {
  ComputeCapability capability;
  bool alone = false;  // "90a": runs on no later one
};

// Null for what has no machine code in it.
std::optional<Architecture> parse(std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{}) return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  Architecture result{{number / 10, number % 10}};
  if (text.starts_with('a')) {
    result.alone = true;
    text.remove_prefix(1);
  }
  if (!text.empty() && text != "-real") return std::nullopt;
  return result;
}

std::vector<Architecture> parse_all(std::string_view architectures) {
  std::vector<Architecture> result;
  while (!architectures.empty()) {
    const std::size_t end = architectures.find_first_of(";,");
    if (const auto one = parse(architectures.substr(0, end))) result.push_back(*one);
    architectures.remove_prefix(end == std::string_view::npos ? architectures.size() : end + 1);
  }
  return result;
}

bool runs_on(const Architecture& architecture, ComputeCapability device) {
  const auto [major, minor] = architecture.capability;
  return major == device.major &&
         (architecture.alone ? minor == device.minor : minor <= device.minor);
}

}  // namespace

bool runs_on(std::string_view architectures, ComputeCapability device) {
  for (const Architecture& architecture : parse_all(architectures))
    if (runs_on(architecture, device)) return true;
  return false;
}

std::string architecture_for(ComputeCapability device) {
  if (device.major < 8) return "";
  return device.major == 9 ? "90a-real" : fmt::format("{}0-real", device.major);
}

std::string no_code_because(std::string_view architectures, ComputeCapability device) {
  if (runs_on(architectures, device)) return "";
  std::vector<std::string> built;
  for (const auto& [capability, alone] : parse_all(architectures))
    built.push_back(fmt::format("{}.{}", capability.major, capability.minor));
  const std::string fitting = architecture_for(device);
  return fmt::format("has compute capability {}.{}; this build has code for {}; {}", device.major,
                     device.minor, fmt::join(built, ", "),
                     fitting.empty()
                         ? "the kernels need 8.0 or later"
                         : fmt::format("build it with CMAKE_CUDA_ARCHITECTURES={}", fitting));
}

}  // namespace clusterfusion::plan
