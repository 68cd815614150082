#include "cli/exit_code.hpp"

#include <gtest/gtest.h>

namespace clusterfusion::cli {
namespace {

TEST(ExitCode, ValuesOfTheCallerAreMisuse) {
  for (const ErrorKind kind :
       {ErrorKind::invalid_argument, ErrorKind::wrong_type, ErrorKind::out_of_range}) {
    EXPECT_EQ(exit_code_of(kind), 2);
  }
}

TEST(ExitCode, FilesAndMachineAreFailure) {
  for (const ErrorKind kind :
       {ErrorKind::not_found, ErrorKind::permission_denied, ErrorKind::io, ErrorKind::malformed,
        ErrorKind::unsupported, ErrorKind::out_of_memory, ErrorKind::non_finite,
        ErrorKind::interrupted, ErrorKind::internal}) {
    EXPECT_EQ(exit_code_of(kind), 1);
  }
}

}  // namespace
}  // namespace clusterfusion::cli
