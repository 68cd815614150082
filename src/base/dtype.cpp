#include "clusterfusion/model.hpp"

namespace clusterfusion {

int size_of(DType dtype) noexcept { return dtype == DType::float32 ? 4 : 2; }

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
  }
  return "unknown";
}

}  // namespace clusterfusion
