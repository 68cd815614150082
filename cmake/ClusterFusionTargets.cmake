# How every target of the project is compiled.

add_library(cf_options INTERFACE)
target_compile_features(cf_options INTERFACE cxx_std_20)
target_compile_options(cf_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${CLUSTERFUSION_WERROR}>>:-Werror>)
target_include_directories(cf_options INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/src>)
if(CLUSTERFUSION_SANITIZE)
  target_compile_options(cf_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${CLUSTERFUSION_SANITIZE} -fno-omit-frame-pointer
      -fno-sanitize-recover=all>)
  target_link_options(cf_options INTERFACE -fsanitize=${CLUSTERFUSION_SANITIZE})
endif()
# What runs only around what is tested or measured: how long it takes to compile is what counts.
add_library(cf_quick_compilation INTERFACE)
if(CLUSTERFUSION_SANITIZE OR CMAKE_BUILD_TYPE STREQUAL "Debug")
  target_compile_options(cf_quick_compilation INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-O0>)
else()
  target_compile_options(cf_quick_compilation INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-O1>)
endif()

# What tests/fuzz feeds with input.
set(CF_FUZZED_COMPONENTS cf_base cf_io cf_model cf_tokenizer)

# cf_component(NAME SOURCES a.cpp ... DEPENDS cf_base ...): one folder of src/ as a static library.
# A component may depend only on those that docs/architecture.md allows it to know.
function(cf_component name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  if(CLUSTERFUSION_FUZZERS AND name IN_LIST CF_FUZZED_COMPONENTS)
    # Coverage, by which a fuzzer finds its way; the fuzzers themselves link with -fsanitize=fuzzer.
    target_compile_options(${name} PRIVATE -fsanitize=fuzzer-no-link)
    target_link_options(${name} INTERFACE -fsanitize=fuzzer-no-link)
  endif()
  target_link_libraries(${name} PUBLIC cf_options dlpack::dlpack fmt::fmt ${ARG_DEPENDS})
  set_property(GLOBAL APPEND PROPERTY CF_COMPONENTS ${name})
endfunction()

# cf_unit_test(NAME SOURCES a_test.cpp ... DEPENDS cf_base ...): one GoogleTest program.
# Tests find files through CF_SOURCE_DIR (the project's root).
function(cf_unit_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE
    cf_options cf_quick_compilation ${ARG_DEPENDS} GTest::gtest_main GTest::gmock)
  target_compile_definitions(${name} PRIVATE CF_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  if(CLUSTERFUSION_SANITIZE)
    # All in one process: a sanitizer's start takes longer than most tests.
    add_test(NAME ${name} COMMAND ${name} --gtest_brief=1)
    set_tests_properties(${name} PROPERTIES TIMEOUT 1800)
  else()
    gtest_discover_tests(${name} DISCOVERY_TIMEOUT 120 PROPERTIES TIMEOUT 600)
  endif()
endfunction()

# cf_fuzzer(NAME SOURCES a_fuzzer.cpp DEPENDS ... CORPUS folder): one libFuzzer target.
function(cf_fuzzer name)
  cmake_parse_arguments(ARG "" "CORPUS" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE cf_options ${ARG_DEPENDS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
