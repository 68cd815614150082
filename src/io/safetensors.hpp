// The safetensors format: https://github.com/huggingface/safetensors#format
//
//   8 bytes   N, the header's length, little-endian
//   N bytes   JSON: {"NAME": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}
//   the rest  the tensors' bytes, back to back: every byte belongs to exactly one tensor
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "io/tensor_entry.hpp"

namespace clusterfusion {

// Reads the header of a whole file's bytes and checks it against the file's size; touches nothing
// behind the header. Refuses what the reference implementation refuses, so that tensors neither
// overlap nor leave holes and the file is neither longer nor shorter than the header promises.
// `file` stands for the bytes in messages. The tensors come in the order of their bytes.
// Errors: malformed; unsupported for a dtype that the format does not know.
std::vector<TensorEntry> parse_safetensors(std::span<const std::byte> bytes,
                                           const std::string& file);
// The strings under "__metadata__" of the same file; none if it is not there. Errors: malformed.
std::map<std::string, std::string> safetensors_metadata(std::span<const std::byte> bytes,
                                                        const std::string& file);

}  // namespace clusterfusion
