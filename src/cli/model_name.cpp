#include "cli/model_name.hpp"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>
#include <vector>

#include "base/fail.hpp"
#include "cli/python.hpp"

namespace clusterfusion::cli {
namespace {

// Not of the current folder, whose files may have any name.
constexpr const char* kDownload =
    "import sys; sys.path = [path for path in sys.path if path]; "
    "from clusterfusion.hub import main; sys.exit(main())";

struct Ended {
  int status = 0;      // as waitpid gives it
  std::string output;  // from standard output
};

[[noreturn]] void fail_errno(int error, const std::string& action) {
  fail(ErrorKind::io, "cannot {}: {}", action, std::generic_category().message(error));
}

// Reads to the end and closes.
std::string read_all(int descriptor) {
  std::string all;
  std::array<char, 4096> buffer{};
  while (true) {
    const ssize_t count = ::read(descriptor, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    all.append(buffer.data(), static_cast<std::size_t>(count));
  }
  ::close(descriptor);
  return all;
}

// Runs a program to its end; standard input and standard error are the caller's.
Ended run_program(std::vector<std::string> arguments) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::array<int, 2> ends{};
  if (::pipe(ends.data()) != 0) fail_errno(errno, "make a pipe");
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  ::posix_spawn_file_actions_addclose(&actions, ends[0]);
  ::posix_spawn_file_actions_addclose(&actions, ends[1]);
  pid_t child = 0;
  const int error = ::posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  if (error != 0) {
    ::close(ends[0]);
    fail_errno(error, "run " + arguments[0]);
  }
  Ended ended;
  ended.output = read_all(ends[0]);
  while (::waitpid(child, &ended.status, 0) < 0 && errno == EINTR) {
  }
  return ended;
}

// Its standard output is the folder, or why there is none.
std::filesystem::path download(const std::string& python, const ModelName& model,
                               CheckpointFiles files, bool quiet) {
  std::vector<std::string> arguments = {python, "-c", kDownload, model.name};
  if (!model.revision.empty()) arguments.push_back("--revision=" + model.revision);
  if (files == CheckpointFiles::tokenizer) arguments.push_back("--tokenizer-only");
  if (quiet) arguments.emplace_back("--quiet");
  Ended ended = run_program(arguments);
  while (ended.output.ends_with('\n')) ended.output.pop_back();
  const bool is_done = WIFEXITED(ended.status) && WEXITSTATUS(ended.status) == 0;
  require(is_done && !ended.output.empty(), ErrorKind::not_found, "{}",
          ended.output.empty() ? "downloading " + model.name + " was broken off" : ended.output);
  return ended.output;
}

}  // namespace

std::filesystem::path find_or_download(const ModelName& model, CheckpointFiles files, bool quiet) {
  try {
    return find_checkpoint(model.name, model.revision, files);
  } catch (const Error& missing) {
    const std::string python = find_python();
    if (missing.kind() != ErrorKind::not_found || python.empty()) throw;
    return download(python, model, files, quiet);
  }
}

}  // namespace clusterfusion::cli
