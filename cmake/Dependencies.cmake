# Finds the C++ compiler and the libraries. All that is missing is reported at once, by the names
# that it has at home, for every system.

set(missing "")

# cf_find(PACKAGE what it is and where it comes from): one CMake package.
macro(cf_find package description)
  find_package(${package} QUIET)
  if(NOT ${package}_FOUND)
    list(APPEND missing "${description}")
  endif()
endmacro()

include(CheckLanguage)
if(CMAKE_CXX_COMPILER)
  find_program(CLUSTERFUSION_CXX_FOUND ${CMAKE_CXX_COMPILER})
  mark_as_advanced(CLUSTERFUSION_CXX_FOUND)
else()
  unset(CMAKE_CXX_COMPILER CACHE)  # what was not found before may be there now
  check_language(CXX)
  set(CLUSTERFUSION_CXX_FOUND ${CMAKE_CXX_COMPILER})
endif()
if(CLUSTERFUSION_CXX_FOUND)
  enable_language(CXX)
  find_package(Threads REQUIRED)
else()
  list(APPEND missing "a C++20 compiler: GCC 12, Clang 14 or later (CXX or CMAKE_CXX_COMPILER names one)")
  # To find libraries all the same: the folder where Debian keeps them, which CMake learns from the
  # compiler, and the one dependency of theirs that only a compiler can find.
  set(CMAKE_LIBRARY_ARCHITECTURE ${CMAKE_HOST_SYSTEM_PROCESSOR}-linux-gnu)
  file(WRITE ${CMAKE_BINARY_DIR}/without_compiler/FindThreads.cmake "set(Threads_FOUND TRUE)\n")
  list(PREPEND CMAKE_MODULE_PATH ${CMAKE_BINARY_DIR}/without_compiler)
endif()

cf_find(fmt "fmt, https://github.com/fmtlib/fmt")
cf_find(dlpack "DLPack, https://github.com/dmlc/dlpack")
cf_find(hwy "Highway, https://github.com/google/highway")
cf_find(simdjson "simdjson, https://github.com/simdjson/simdjson")
cf_find(nlohmann_json "JSON for Modern C++, https://github.com/nlohmann/json")
cf_find(utf8proc "utf8proc, https://github.com/JuliaStrings/utf8proc")
cf_find(pcre2 "PCRE2, https://github.com/PCRE2Project/pcre2")
if(CLUSTERFUSION_CLI)
  cf_find(CLI11 "CLI11, https://github.com/CLIUtils/CLI11")
endif()
set(purpose build)
if(CLUSTERFUSION_TESTS)
  set(purpose test)
  if(CLUSTERFUSION_CXX_FOUND)  # its module compiles something
    cf_find(GTest "GoogleTest and GoogleMock, https://github.com/google/googletest")
  endif()
endif()

if(missing)
  list(JOIN missing "\n  " missing)
  message(FATAL_ERROR "ClusterFusion needs what CMake does not find here:\n"
    "  ${missing}\n"
    "On Debian and Ubuntu this installs it (in the project's folder):\n"
    "  tools/install_dependencies.sh ${purpose}\n"
    "Elsewhere: install it, and name its folders in CMAKE_PREFIX_PATH if CMake does not look there.")
endif()
