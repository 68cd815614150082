// The command line that the GPU benchmarks share: options, then names of shapes.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "random_model.hpp"

namespace clusterfusion::benchmark {

class ShapeArguments {
 public:
  ShapeArguments(int argc, char** argv) : rest_(argv + 1, argv + argc) {}

  // Numbers behind an option, "1,2,3", or what is meant without it.
  std::vector<std::int64_t> numbers(const std::string& option,
                                    std::vector<std::int64_t> otherwise) {
    const auto found = std::find(rest_.begin(), rest_.end(), option);
    if (found == rest_.end()) return otherwise;
    if (found + 1 == rest_.end())
      throw std::invalid_argument(option + ": expected numbers, found the end of the command line");
    std::vector<std::int64_t> numbers;
    std::stringstream list(*(found + 1));
    for (std::string item; std::getline(list, item, ',');) numbers.push_back(std::stoll(item));
    rest_.erase(found, found + 2);
    return numbers;
  }
  bool flag(const std::string& option) { return std::erase(rest_, option) > 0; }

  // The shapes named by what is left; Pythia-2.8B if nothing is.
  std::vector<const Shape*> shapes() const {
    std::vector<const Shape*> shapes;
    for (const std::string& name : rest_) {
      shapes.push_back(find_shape(name));
      if (shapes.back() == nullptr)
        throw std::invalid_argument(name + ": expected a shape, one of " + names_of_shapes());
    }
    if (shapes.empty()) shapes.push_back(find_shape("pythia-2.8b"));
    return shapes;
  }

 private:
  std::vector<std::string> rest_;
};

// Runs a benchmark's body and prints the JSON list of the strings that it returns; an error ends
// with its message and exit code 1.
template <typename Body>
int run_benchmark(const char* program, Body&& body) {
  try {
    std::printf("[%s]\n", fmt::format("{}", fmt::join(body(), ",\n ")).c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 1;
  }
}

}  // namespace clusterfusion::benchmark
