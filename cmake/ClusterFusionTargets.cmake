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
if(CLUSTERFUSION_FUZZERS)
  # Coverage for the libraries; the targets themselves link with -fsanitize=fuzzer.
  target_compile_options(cf_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=fuzzer-no-link>)
  target_link_options(cf_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# cf_component(NAME SOURCES a.cpp ... DEPENDS cf_base ...): one folder of src/ as a static library.
# A component may depend only on those that docs/architecture.md allows it to know.
function(cf_component name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(${name} PUBLIC cf_options dlpack::dlpack fmt::fmt ${ARG_DEPENDS})
  set_property(GLOBAL APPEND PROPERTY CF_COMPONENTS ${name})
endfunction()

# cf_unit_test(NAME SOURCES a_test.cpp ... DEPENDS cf_base ...): one GoogleTest program.
# Tests find files through CF_SOURCE_DIR (the project's root).
function(cf_unit_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE cf_options ${ARG_DEPENDS} GTest::gtest_main GTest::gmock)
  target_compile_definitions(${name} PRIVATE CF_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 120 PROPERTIES TIMEOUT 600)
endfunction()

# cf_fuzzer(NAME SOURCES a_fuzzer.cpp DEPENDS ... CORPUS folder): one libFuzzer target.
function(cf_fuzzer name)
  cmake_parse_arguments(ARG "" "CORPUS" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE cf_options ${ARG_DEPENDS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
