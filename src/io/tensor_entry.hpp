// Where a file of tensors holds one of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace clusterfusion {

struct TensorEntry {
  std::string name;
  std::string dtype;                  // as safetensors spells it: "F16", "BF16", "F32", "BOOL", ...
  std::vector<std::int64_t> shape;    // no element negative; the product does not overflow
  std::size_t begin = 0, end = 0;     // where its bytes are, counted from the file's start
  std::vector<std::int64_t> strides;  // in elements; empty if row-major without gaps, else the
                                      // bytes are those from its first element to its last
};

}  // namespace clusterfusion
