// std::condition_variable, also for systems with the library of GCC 11 (RHEL 9 and its relatives).
#pragma once

#include <condition_variable>

// GCC 12 gave wait() a new symbol version for no longer being noexcept. The old one is in every
// libstdc++, and it is the only symbol that would keep the wheel from manylinux_2_34.
#if defined(__GLIBCXX__) && defined(__x86_64__)
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif
