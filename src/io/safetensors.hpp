// The safetensors format: https://github.com/huggingface/safetensors#format
//
//   8 bytes   N, the header's length, little-endian
//   N bytes   JSON: {"NAME": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}
//   the rest  the tensors' bytes, back to back: every byte belongs to exactly one tensor
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace clusterfusion {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;                // as the file spells it: "F16", "BF16", "F32", "BOOL", ...
  std::vector<std::int64_t> shape;  // no element negative; the product does not overflow
  std::size_t begin = 0, end = 0;   // where its bytes are, counted from the file's start
};

// Reads the header of a whole file's bytes and checks it against the file's size; touches nothing
// behind the header. Refuses what the reference implementation refuses, so that tensors neither
// overlap nor leave holes and the file is neither longer nor shorter than the header promises.
// `file` stands for the bytes in messages. The tensors come in the order of their bytes.
// Errors: malformed; unsupported for a dtype that the format does not know.
std::vector<SafetensorsTensor> parse_safetensors(std::span<const std::byte> bytes,
                                                 const std::string& file);

}  // namespace clusterfusion
