// What tells models apart.
#pragma once

#include <string>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// 16 hexadecimal digits of what the model computes: its shape, and every byte of its weights (all
// are read, with all cores). What is around that does not count: its folder, how files are cut,
// end-of-text tokens, the longest context. Errors: io if a file lost bytes.
std::string fingerprint_of(const Model& model);

}  // namespace clusterfusion
