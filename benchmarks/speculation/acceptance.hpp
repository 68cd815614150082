// How many tokens a step gives with a draft that always proposes as many, on texts of a file.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "clusterfusion/engine.hpp"

namespace clusterfusion::benchmark {

struct Prompt {
  std::string kind;
  std::string text;
};

// Of a JSON list of {"kind", "prompt"}.
std::vector<Prompt> read_prompts(const std::string& file);

struct AcceptanceSettings {
  std::string model;                // checkpoint folder
  std::vector<std::string> drafts;  // as EngineOptions::draft
  std::vector<Prompt> prompts;
  std::vector<int> proposals = {1, 2, 3, 4, 5, 6, 7, 8, 11, 15};  // in each step
  std::vector<float> temperatures = {0.0f, 0.8f};
  std::int64_t tokens = 128;  // of each text
  std::string device = "cpu";
  EngineOptions options = {};  // threads and mode
};

// Sums over the prompts of each kind. Nothing of it depends on the device's speed.
nlohmann::json measure_acceptance(const AcceptanceSettings& settings);

}  // namespace clusterfusion::benchmark
