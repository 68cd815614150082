#include "cli/python.hpp"

#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace clusterfusion::cli {

std::string find_python() {
  if (const char* named = std::getenv(kHubPython)) return named;
#ifdef CLUSTERFUSION_WHEEL
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  const auto beside = program.parent_path() / "python3";
  if (!error && std::filesystem::exists(beside, error)) return beside;
#endif
  return {};
}

}  // namespace clusterfusion::cli
