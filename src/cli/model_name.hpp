// The MODEL of the command line: a folder, or a name on the Hugging Face hub.
#pragma once

#include <filesystem>
#include <string>

#include "clusterfusion/hub.hpp"

namespace clusterfusion::cli {

struct ModelName {
  std::string name;
  std::string revision;
};

// find_checkpoint(); if the cache lacks something and there is a find_python(), after it has been
// downloaded by that Python's clusterfusion.hub, whose progress bar goes to standard error unless
// `quiet`. Errors: those of find_checkpoint(), or what kept it from being downloaded.
std::filesystem::path find_or_download(const ModelName& model, CheckpointFiles files, bool quiet);

}  // namespace clusterfusion::cli
