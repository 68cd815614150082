// Whether the files under a model are still what they were.
#pragma once

#include <optional>
#include <string>

#include "base/fail.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion {

// Errors: io if a file of the checkpoint lost bytes while it was in use.
inline void require_intact(const Model& model) {
  if (const std::optional<std::string> file = model.find_lost_file()) {
    fail(
        ErrorKind::io,
        "{} became shorter, or could not be read, while it was in use, so that there is no result; "
        "put the whole file back (by renaming it into its place) and open the model again",
        *file);
  }
}

}  // namespace clusterfusion
