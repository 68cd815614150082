# Says whether the CUDA code is built (CLUSTERFUSION_WITH_CUDA), by CLUSTERFUSION_CUDA: ON, OFF, or
# AUTO, where a toolkit that cannot compile it is left out with a message.

set(CLUSTERFUSION_CUDA_MINIMUM 13.0)
set(CLUSTERFUSION_WITH_CUDA OFF)

# cf_find_nvcc(COMPILER OBSTACLE): the path of nvcc, and what keeps it from compiling this project
# ("" if nothing does).
function(cf_find_nvcc compiler obstacle)
  set(${obstacle} "no CUDA toolkit was found" PARENT_SCOPE)
  set(${compiler} "" PARENT_SCOPE)
  if(CMAKE_CUDA_COMPILER)
    set(names ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(names $ENV{CUDACXX})
  else()
    set(names nvcc)
  endif()
  find_program(CLUSTERFUSION_NVCC ${names} HINTS $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  mark_as_advanced(CLUSTERFUSION_NVCC)
  if(NOT CLUSTERFUSION_NVCC)
    return()
  endif()
  set(${compiler} ${CLUSTERFUSION_NVCC} PARENT_SCOPE)
  execute_process(COMMAND ${CLUSTERFUSION_NVCC} --version
    OUTPUT_VARIABLE version ERROR_VARIABLE version RESULT_VARIABLE status)
  if(NOT version MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${obstacle} "${CLUSTERFUSION_NVCC} --version does not tell its release" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS CLUSTERFUSION_CUDA_MINIMUM)
    set(${obstacle} "${CLUSTERFUSION_NVCC} is of CUDA ${CMAKE_MATCH_1}, and the code needs \
${CLUSTERFUSION_CUDA_MINIMUM} or later" PARENT_SCOPE)
  else()
    set(${obstacle} "" PARENT_SCOPE)
  endif()
endfunction()

# cf_cuda_architectures(ARCHITECTURES): of the GPU that is there, or of Hopper. Code for 8.0 runs on
# 8.6 and 8.9, code for 10.0 and 12.0 on what has the same number in front; Hopper's instructions are
# 9.0's alone.
function(cf_cuda_architectures architectures)
  set(${architectures} 90a-real PARENT_SCOPE)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE found ERROR_QUIET)
  if(found MATCHES "^(8|10|12)\\.[0-9]")
    set(${architectures} ${CMAKE_MATCH_1}0-real PARENT_SCOPE)
  endif()
endfunction()

# cf_check_cuda_architectures(ARCHITECTURE ...): whether the kernels can be compiled for them. Machine
# code alone: what the driver compiles anew would take the ways of another chip.
function(cf_check_cuda_architectures)
  foreach(architecture IN LISTS ARGN)
    if(architecture MATCHES "^(8[0-9]|90a|10[0-9]a?|12[0-9]a?)(-real)?$")
      continue()
    endif()
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES (or CUDAARCHS) is \"${ARGN}\", and the kernels \
cannot be compiled for \"${architecture}\". It may hold 80-real (runs on 8.0, 8.6 and 8.9), 90a-real \
(9.0), 100-real (10.x) and 120-real (12.x), with semicolons between; unset, it is the GPU that is here")
  endforeach()
endfunction()

if(CLUSTERFUSION_CUDA STREQUAL "AUTO" OR CLUSTERFUSION_CUDA)
  cf_find_nvcc(nvcc obstacle)
  if(NOT obstacle AND NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
    set(ENV{CUDACXX} ${nvcc})
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(obstacle "${nvcc} does not work, perhaps not with this C++ compiler (CUDAHOSTCXX names \
another); `${nvcc} -c` of an empty .cu file tells why")
    endif()
  endif()
  if(NOT obstacle)
    set(CLUSTERFUSION_WITH_CUDA ON)
    message(STATUS "CUDA: on, with ${nvcc}")
  elseif(NOT CLUSTERFUSION_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "CLUSTERFUSION_CUDA is ${CLUSTERFUSION_CUDA}, but ${obstacle}")
  elseif(nvcc)
    message(WARNING "CUDA: off, since ${obstacle}; models run on the CPU")
  else()
    message(STATUS "CUDA: off, since ${obstacle}")
  endif()
else()
  message(STATUS "CUDA: off, as CLUSTERFUSION_CUDA says")
endif()

if(CLUSTERFUSION_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    cf_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
    message(STATUS "CUDA: for ${CMAKE_CUDA_ARCHITECTURES}; CMAKE_CUDA_ARCHITECTURES says for what else")
  endif()
  if(CMAKE_CUDA_ARCHITECTURES)
    cf_check_cuda_architectures(${CMAKE_CUDA_ARCHITECTURES})
  else()
    cf_check_cuda_architectures($ENV{CUDAARCHS})
  endif()
  if(NOT CLUSTERFUSION_CUDA_COPY MATCHES "^(architecture|async|bulk)$")
    message(FATAL_ERROR "CLUSTERFUSION_CUDA_COPY is \"${CLUSTERFUSION_CUDA_COPY}\"; expected \
architecture, or for tests on Hopper async (as compute capability 8.0) or bulk (as 12.0)")
  elseif(CLUSTERFUSION_CUDA_COPY STREQUAL "bulk" AND "${CMAKE_CUDA_ARCHITECTURES}" MATCHES "(^|;)8")
    message(FATAL_ERROR "CLUSTERFUSION_CUDA_COPY=bulk: CMAKE_CUDA_ARCHITECTURES is \
\"${CMAKE_CUDA_ARCHITECTURES}\", and only 9.0 and later have bulk copies")
  endif()
  enable_language(CUDA)
  # Debian 12's CMake sets a property of this target, and CUDA 13 has no such library.
  if(CMAKE_VERSION VERSION_LESS 3.26 AND NOT TARGET CUDA::nvToolsExt)
    add_library(CUDA::nvToolsExt INTERFACE IMPORTED)
  endif()
  find_package(CUDAToolkit REQUIRED)
endif()
