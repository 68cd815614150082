// A mapped file that becomes shorter, or cannot be read, ends the process with SIGBUS at the next
// touch of what is gone. Where a guard stands, zeros take its place and the process goes on.
#pragma once

#include <cstddef>
#include <span>

namespace clusterfusion {

// Guards a mapping of whole pages (but for the last one) as long as it lives. The first guard of
// the process installs a handler of SIGBUS, which passes on to the one before it whatever lies
// outside all guarded mappings.
class MappingGuard {
 public:
  explicit MappingGuard(std::span<const std::byte> mapping);
  ~MappingGuard();
  MappingGuard(MappingGuard&& other) noexcept;
  MappingGuard& operator=(MappingGuard&&) = delete;

  // Zeros stand in part of the mapping: what was computed from it since is worth nothing.
  bool has_lost_pages() const noexcept;

  struct Slot;  // what the handler reads

 private:
  Slot* slot_;
};

}  // namespace clusterfusion
