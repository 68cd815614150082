// What the files beside tokenizer.json ask for, as transformers' AutoTokenizer reads them.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "clusterfusion/tokenizer.hpp"
#include "tokenizer/tokenizer_file.hpp"

namespace clusterfusion {

// Looks through tokenizer_config.json, special_tokens_map.json and added_tokens.json in `folder`
// for what changes ids and is not in `file` already. Each entry is a warning that names the file,
// the key and the difference. transformers writes it all into tokenizer.json when it saves a
// tokenizer; files written by hand or by old versions may say more. A file that cannot be read is
// one warning.
std::vector<std::string> unmet_settings(const std::filesystem::path& folder,
                                        const TokenizerFile& file);

// The tokenizer of a checkpoint's folder; null if it has no tokenizer.json. Errors: those of
// Tokenizer::open.
std::shared_ptr<const Tokenizer> open_tokenizer_of(const std::filesystem::path& folder);

// For a folder without tokenizer.json: says what it has instead, and what to do. Errors: not_found.
[[noreturn]] void fail_no_tokenizer(const std::filesystem::path& folder);

}  // namespace clusterfusion
