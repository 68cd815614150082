#include "clusterfusion/hub.hpp"

#include <tvm/ffi/string.h>

#include <string>

#include "export.hpp"

namespace clusterfusion::python {
namespace {

namespace ffi = tvm::ffi;

bool hub_is_name(ffi::String name) { return is_hub_name(std::string(name)); }

ffi::String hub_cache() { return hub_cache_folder().string(); }

ffi::String hub_find(ffi::String name, ffi::String revision, bool tokenizer_only) {
  const auto files = tokenizer_only ? CheckpointFiles::tokenizer : CheckpointFiles::model;
  return find_checkpoint(std::string(name), revision, files).string();
}

CLUSTERFUSION_EXPORT(hub_is_name)
CLUSTERFUSION_EXPORT(hub_cache)
CLUSTERFUSION_EXPORT(hub_find)

}  // namespace
}  // namespace clusterfusion::python
