#include "io/mapping_guard.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <utility>

namespace clusterfusion {

// Slots are never freed, so that the handler may walk over them at any time; a free one has an
// `end` of 0 and is taken again.
struct MappingGuard::Slot {
  std::atomic<std::uintptr_t> begin = 0;
  std::atomic<std::uintptr_t> end = 0;
  std::atomic<bool> has_lost_pages = false;
  Slot* next = nullptr;
};

namespace {

using Slot = MappingGuard::Slot;

std::atomic<Slot*> slots{nullptr};
static_assert(std::atomic<Slot*>::is_always_lock_free, "used in a signal handler");
std::mutex taking;  // of slots; not by the handler
struct sigaction previous_action;
std::uintptr_t page_bytes;

Slot* slot_of(std::uintptr_t address) noexcept {
  for (Slot* slot = slots.load(); slot != nullptr; slot = slot->next) {
    if (address < slot->end.load() && address >= slot->begin.load()) return slot;
  }
  return nullptr;
}

// What is gone from a file is gone up to its end. Async-signal-safe: system calls and atomics.
bool replace_by_zeros(std::uintptr_t address) noexcept {
  Slot* slot = slot_of(address);
  if (slot == nullptr) return false;
  const std::uintptr_t page = address / page_bytes * page_bytes;
  slot->has_lost_pages.store(true);
  return ::mmap(reinterpret_cast<void*>(page), slot->end.load() - page, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

void handle_bus_error(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const bool is_mended = replace_by_zeros(reinterpret_cast<std::uintptr_t>(info->si_addr));
  errno = error;
  if (is_mended) return;  // the access is tried again
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(number, info, context);
  } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
    std::signal(number, SIG_DFL);  // the access, tried again, ends the process
  } else {
    previous_action.sa_handler(number);
  }
}

void install_handler() {
  page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  ::sigaction(SIGBUS, nullptr, &previous_action);
  struct sigaction action {};
  action.sa_sigaction = handle_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

Slot* free_slot() {
  for (Slot* slot = slots.load(); slot != nullptr; slot = slot->next) {
    if (slot->end.load() == 0) return slot;
  }
  auto* slot = new Slot;
  slot->next = slots.load();
  slots.store(slot);
  return slot;
}

}  // namespace

MappingGuard::MappingGuard(std::span<const std::byte> mapping) {
  static std::once_flag installed;
  std::call_once(installed, install_handler);
  const std::lock_guard lock(taking);
  slot_ = free_slot();
  const auto begin = reinterpret_cast<std::uintptr_t>(mapping.data());
  slot_->has_lost_pages.store(false);
  slot_->begin.store(begin);
  slot_->end.store((begin + mapping.size() + page_bytes - 1) / page_bytes * page_bytes);
}

MappingGuard::~MappingGuard() {
  if (slot_ != nullptr) slot_->end.store(0);
}

MappingGuard::MappingGuard(MappingGuard&& other) noexcept
    : slot_(std::exchange(other.slot_, nullptr)) {}

bool MappingGuard::has_lost_pages() const noexcept { return slot_->has_lost_pages.load(); }

}  // namespace clusterfusion
