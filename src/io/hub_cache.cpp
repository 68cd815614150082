#include <fmt/ranges.h>
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/fail.hpp"
#include "clusterfusion/hub.hpp"
#include "io/json.hpp"
#include "io/mapped_file.hpp"
#include "io/tensor_store.hpp"

namespace clusterfusion {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxNamePart = 96;  // huggingface_hub's validate_repo_id
constexpr std::size_t kMaxRefBytes = 1000;
constexpr std::size_t kMaxRevisionsInMessage = 5;

bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// The owner or the name.
bool is_name_part(std::string_view part) {
  const auto is_allowed = [](char c) { return is_word(c) || c == '-' || c == '.'; };
  return !part.empty() && part.size() <= kMaxNamePart && is_word(part.front()) &&
         is_word(part.back()) && std::all_of(part.begin(), part.end(), is_allowed) &&
         part.find("--") == part.npos && part.find("..") == part.npos;
}

bool has_hub_form(std::string_view name) {
  const std::size_t slash = name.find('/');
  return slash != name.npos && is_name_part(name.substr(0, slash)) &&
         is_name_part(name.substr(slash + 1)) && !name.ends_with(".git");
}

// An environment variable counts as set although it is empty, as os.getenv has it.
std::optional<std::string> environment(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

// As os.path.expanduser.
std::string expand_user(const std::string& path) {
  if (!path.starts_with('~')) return path;
  const std::size_t end = std::min(path.find('/'), path.size());
  const std::string user = path.substr(1, end - 1);
  std::optional<std::string> home = user.empty() ? environment("HOME") : std::nullopt;
  if (!home) {
    const passwd* entry = user.empty() ? ::getpwuid(::getuid()) : ::getpwnam(user.c_str());
    if (entry == nullptr) return path;
    home = entry->pw_dir;
  }
  while (home->ends_with('/')) home->pop_back();
  const std::string expanded = *home + path.substr(end);
  return expanded.empty() ? "/" : expanded;
}

// As os.path.expandvars: $NAME and ${NAME}; unknown ones stay as they are.
std::string expand_variables(const std::string& path) {
  std::string expanded;
  for (std::size_t at = 0; at < path.size();) {
    std::size_t begin = at + 1;
    std::size_t end = begin;
    std::size_t next = begin;
    if (path[at] == '$' && path.compare(begin, 1, "{") == 0) {
      end = path.find('}', ++begin);
      next = end == path.npos ? end : end + 1;
    } else if (path[at] == '$') {
      while (end < path.size() && is_word(path[end])) ++end;
      next = end;
    }
    const bool is_variable = path[at] == '$' && end != path.npos && end > begin;
    const auto value = is_variable ? environment(path.substr(begin, end - begin)) : std::nullopt;
    expanded += value ? *value : std::string(1, path[at]);
    at = value ? next : at + 1;
  }
  return expanded;
}

std::string expand(const std::string& path) { return expand_variables(expand_user(path)); }

void check_revision(const std::string& revision) {
  const auto is_odd = [](char c) { return static_cast<unsigned char>(c) <= ' ' || c == '\\'; };
  const bool can_be = !revision.starts_with('-') && !revision.starts_with('/') &&
                      !revision.starts_with('.') && revision.find("/.") == revision.npos &&
                      revision.find("..") == revision.npos &&
                      std::none_of(revision.begin(), revision.end(), is_odd);
  require(can_be, ErrorKind::invalid_argument,
          "revision must be a branch, a tag or a commit hash, got {}", quote(revision));
}

// The commands that fill the cache, for a shell.
std::string download_command(const std::string& name, const std::string& revision) {
  std::string command = "hf download " + name;
  if (revision != "main") {
    const auto is_plain = [](char c) { return is_word(c) || c == '-' || c == '.' || c == '/'; };
    const bool plain = std::all_of(revision.begin(), revision.end(), is_plain);
    std::string quoted;
    for (const char c : revision) quoted += c == '\'' ? "'\\''" : std::string(1, c);
    command += " --revision " + (plain ? revision : "'" + quoted + "'");
  }
  return command + "  (of the Python package huggingface_hub)";
}

// "it has main, step3000": the branches and tags in the cache.
std::string known_revisions(const fs::path& model) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::recursive_directory_iterator at(model / "refs", error), end; at != end;
       at.increment(error)) {
    if (at->is_regular_file(error)) names.push_back(at->path().lexically_relative(model / "refs"));
  }
  std::sort(names.begin(), names.end());
  const bool is_cut = names.size() > kMaxRevisionsInMessage;
  if (is_cut) names.resize(kMaxRevisionsInMessage);
  if (names.empty()) return "it has no branch or tag";
  return fmt::format("it has {}{}", fmt::join(names, ", "), is_cut ? ", ..." : "");
}

// The name of a folder in snapshots/ for a branch, a tag or a commit hash.
std::string commit_of(const fs::path& model, const std::string& revision) {
  const fs::path ref = model / "refs" / revision;
  std::error_code error;
  if (!fs::is_regular_file(ref, error)) return revision;
  std::string commit = read_file(ref, kMaxRefBytes);
  while (commit.ends_with('\n')) commit.pop_back();
  const bool is_plain = !commit.empty() && std::all_of(commit.begin(), commit.end(), is_word);
  require(is_plain, ErrorKind::malformed,
          "{}: expected a commit hash, found {}; remove the file and download the model again",
          ref.string(), quote(commit));
  return commit;
}

// The first of `files` that is not in `folder`. A link to what is gone counts as missing.
std::optional<std::string> missing_file(const fs::path& folder, CheckpointFiles files) {
  const std::string first = files == CheckpointFiles::model ? "config.json" : "tokenizer.json";
  std::error_code error;
  if (!fs::exists(folder / first, error)) return first;
  return files == CheckpointFiles::model ? missing_weights(folder) : std::nullopt;
}

}  // namespace

bool is_hub_name(const fs::path& name) { return has_hub_form(name.string()) && !is_there(name); }

// As huggingface_hub/constants.py has it.
fs::path hub_cache_folder() {
  if (const auto cache = environment("HF_HUB_CACHE")) return expand(*cache);
  if (const auto cache = environment("HUGGINGFACE_HUB_CACHE")) return expand(*cache);
  if (const auto home = environment("HF_HOME")) return fs::path(expand(*home)) / "hub";
  const std::string cache = environment("XDG_CACHE_HOME").value_or(expand_user("~") + "/.cache");
  return fs::path(expand(cache + (cache.empty() ? "" : "/") + "huggingface")) / "hub";
}

fs::path find_checkpoint(const fs::path& name, const std::string& revision, CheckpointFiles files) {
  if (!is_hub_name(name)) {
    require(revision.empty(), ErrorKind::invalid_argument,
            "revision {} needs a name on the Hugging Face hub (owner/name), but {} is {}",
            quote(revision), name.string(), is_there(name) ? "a local path" : "none");
    return name;
  }
  check_revision(revision);
  const std::string wanted = revision.empty() ? "main" : revision;
  const std::string command = download_command(name.string(), wanted);
  const fs::path cache = hub_cache_folder();
  std::string folder_name = "models--" + name.string();
  folder_name.replace(folder_name.find('/'), 1, "--");
  const fs::path model = cache / folder_name;
  require(is_there(model), ErrorKind::not_found,
          "no such folder: {0}; nor is a model {0} in the Hugging Face cache {1}. If it is one on "
          "the hub, download it: {2}",
          name.string(), cache.string(), command);
  const std::string commit = commit_of(model, wanted);
  const fs::path snapshot = model / "snapshots" / commit;
  std::error_code error;
  const bool is_here = fs::is_directory(snapshot, error);
  require(is_here || commit == wanted, ErrorKind::not_found,
          "the Hugging Face cache {} knows revision {} of {}, but has no files of it (no {}). "
          "Download it: {}",
          cache.string(), quote(wanted), name.string(), snapshot.string(), command);
  require(is_here, ErrorKind::not_found,
          "the Hugging Face cache {} has no revision {} of {} ({}). Download it: {}",
          cache.string(), quote(wanted), name.string(), known_revisions(model), command);
  const std::optional<std::string> missing = missing_file(snapshot, files);
  require(!missing, ErrorKind::not_found, "{} is incomplete: no {}. Download the rest: {}",
          snapshot.string(), missing.value_or(""), command);
  return snapshot;
}

}  // namespace clusterfusion
