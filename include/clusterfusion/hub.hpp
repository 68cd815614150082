// Checkpoints by their names on the Hugging Face hub, as far as its local cache holds them. Nothing
// here uses the network.
#pragma once

#include <filesystem>
#include <string>

namespace clusterfusion {

enum class CheckpointFiles {
  model,      // config.json and all weights
  tokenizer,  // tokenizer.json
};

// Whether `name` is read as a name on the hub: it has the form owner/name, and there is no such
// file or folder.
bool is_hub_name(const std::filesystem::path& name);

// The cache, where huggingface_hub has it: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub,
// XDG_CACHE_HOME/huggingface/hub or ~/.cache/huggingface/hub, the first that is set.
std::filesystem::path hub_cache_folder();

// `name` itself, unless it is a name on the hub: then the folder of the cache that holds `revision`
// (a branch, a tag or a whole commit hash; empty: "main") of it.
//
// Errors: not_found if the cache lacks the model, its revision or one of `files` (the message has
// the command that downloads them); invalid_argument for a revision that cannot be one, or one of
// what is no name on the hub; malformed for a broken index of shards.
std::filesystem::path find_checkpoint(const std::filesystem::path& name,
                                      const std::string& revision = "",
                                      CheckpointFiles files = CheckpointFiles::model);

}  // namespace clusterfusion
