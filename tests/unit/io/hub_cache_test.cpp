#include <cstdlib>
#include <map>
#include <optional>
#include <string>

#include "clusterfusion/hub.hpp"
#include "io/file_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::safetensors_file;
using test::TemporaryFolder;

const std::string kCommit = "0123456789abcdef0123456789abcdef01234567";
const std::string kOther = "89abcdef0123456789abcdef0123456789abcdef";

// Sets and unsets environment variables, and brings back what was there.
class Environment {
 public:
  explicit Environment(const std::map<std::string, std::string>& values) {
    for (const char* name :
         {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME", "WHERE"}) {
      const char* value = std::getenv(name);
      before_[name] = value == nullptr ? std::nullopt : std::optional<std::string>(value);
      const auto given = values.find(name);
      set(name, given == values.end() ? std::nullopt : std::optional(given->second));
    }
  }
  ~Environment() {
    for (const auto& [name, value] : before_) set(name, value);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  static void set(const std::string& name, const std::optional<std::string>& value) {
    value ? ::setenv(name.c_str(), value->c_str(), 1) : ::unsetenv(name.c_str());
  }
  std::map<std::string, std::optional<std::string>> before_;
};

// A cache with two revisions of owner/model, laid out as huggingface_hub does: files are links to
// blobs.
class HubCache : public ::testing::Test {
 protected:
  HubCache() : environment_({{"HF_HUB_CACHE", folder_.path().string()}}) {
    add_snapshot(kCommit);
    add_snapshot(kOther);
    add_ref("main", kCommit);
    add_ref("step3000", kOther);
    add_ref("refs/pr/1", kOther);
  }

  std::filesystem::path model() const { return folder_.path() / "models--owner--model"; }
  std::filesystem::path snapshot(const std::string& commit) const {
    return model() / "snapshots" / commit;
  }
  void add_file(const std::string& commit, const std::string& name, std::string_view content) {
    std::filesystem::create_directories(model() / "blobs");
    std::filesystem::create_directories(snapshot(commit));
    const std::string blob = commit + "-" + name;
    std::ofstream(model() / "blobs" / blob, std::ios::binary) << content;
    std::filesystem::create_symlink("../../blobs/" + blob, snapshot(commit) / name);
  }
  void add_snapshot(const std::string& commit) {
    add_file(commit, "config.json", "{}");
    add_file(commit, "model.safetensors", safetensors_file({}));
    add_file(commit, "tokenizer.json", "{}");
  }
  void add_ref(const std::string& revision, const std::string& commit) {
    const std::filesystem::path ref = model() / "refs" / revision;
    std::filesystem::create_directories(ref.parent_path());
    std::ofstream(ref) << commit;
  }

  TemporaryFolder folder_;
  Environment environment_;
};

TEST(HubName, IsTwoWordsThatAreNoFile) {
  for (const char* name : {"EleutherAI/pythia-1.4b", "a/b", "a_1/b.c-d", "0/1"}) {
    EXPECT_TRUE(is_hub_name(name)) << name;
  }
  for (const char* name : {"", "a", "/a", "a/", "a/b/c", "./a", "../a", "a/..", "-a/b", "a/b-",
                           "a/b.git", "a/b--c", "a/b..c", "a b/c", "a/\xc3\xa4", "~/a", "a\\b"}) {
    EXPECT_FALSE(is_hub_name(name)) << name;
  }
  EXPECT_FALSE(is_hub_name("a/" + std::string(97, 'b')));
}

// The same cases beside huggingface_hub itself: tests/python/test_hub.py.
TEST(HubCacheFolder, FollowsTheEnvironment) {
  const auto folder = [](const std::map<std::string, std::string>& values) {
    const Environment environment(values);
    return hub_cache_folder().string();
  };
  EXPECT_EQ(folder({{"HOME", "/h"}}), "/h/.cache/huggingface/hub");
  EXPECT_EQ(folder({{"HOME", "/h"}, {"XDG_CACHE_HOME", "/x"}}), "/x/huggingface/hub");
  EXPECT_EQ(folder({{"XDG_CACHE_HOME", "/x"}, {"HF_HOME", "/y"}}), "/y/hub");
  EXPECT_EQ(folder({{"HF_HOME", "/y"}, {"HUGGINGFACE_HUB_CACHE", "/z"}}), "/z");
  EXPECT_EQ(folder({{"HUGGINGFACE_HUB_CACHE", "/z"}, {"HF_HUB_CACHE", "/c"}}), "/c");
  EXPECT_EQ(folder({{"HOME", "/h"}, {"HF_HOME", "~/y"}}), "/h/y/hub");
  EXPECT_EQ(folder({{"WHERE", "/w"}, {"HF_HUB_CACHE", "$WHERE/a/${WHERE}$NONE$"}}),
            "/w/a//w$NONE$");
}

TEST_F(HubCache, FindsRevisions) {
  EXPECT_EQ(find_checkpoint("owner/model"), snapshot(kCommit));
  EXPECT_EQ(find_checkpoint("owner/model", "main"), snapshot(kCommit));
  EXPECT_EQ(find_checkpoint("owner/model", "step3000"), snapshot(kOther));
  EXPECT_EQ(find_checkpoint("owner/model", "refs/pr/1"), snapshot(kOther));
  EXPECT_EQ(find_checkpoint("owner/model", kCommit), snapshot(kCommit));
  add_ref("lines", kOther + "\n");
  EXPECT_EQ(find_checkpoint("owner/model", "lines"), snapshot(kOther));
}

TEST_F(HubCache, LeavesLocalPathsAlone) {
  EXPECT_EQ(find_checkpoint(folder_.path()), folder_.path());
  EXPECT_EQ(find_checkpoint("/no/such/folder"), "/no/such/folder");
  for (const std::string& path : {folder_.path().string(), std::string("nowhere")}) {
    expect_error(ErrorKind::invalid_argument, {"\"step1\"", "owner/name", path},
                 [&] { find_checkpoint(path, "step1"); });
  }
}

// The folder that this test makes in the current one has the name of the cached model.
TEST_F(HubCache, PrefersALocalFolder) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::create_directories(folder_.path() / "here/owner/model");
  std::filesystem::current_path(folder_.path() / "here");
  EXPECT_EQ(find_checkpoint("owner/model"), "owner/model");
  std::filesystem::current_path(before);
  EXPECT_EQ(find_checkpoint("owner/model"), snapshot(kCommit));
}

TEST_F(HubCache, SaysThatARevisionHasNoFiles) {
  add_ref("half", std::string(40, 'e'));
  expect_error(ErrorKind::not_found,
               {"knows revision \"half\" of owner/model", "no files of it",
                "snapshots/" + std::string(40, 'e'), "hf download owner/model --revision half"},
               [] { find_checkpoint("owner/model", "half"); });
}

TEST_F(HubCache, SaysHowToDownload) {
  const std::string cache = folder_.path().string();
  expect_error(
      ErrorKind::not_found,
      {"no such folder: other/model", cache, "hf download other/model ", "huggingface_hub"},
      [] { find_checkpoint("other/model"); });
  expect_error(
      ErrorKind::not_found,
      {cache, "\"step1\"", "refs/pr/1, step3000", "hf download owner/model --revision step1 "},
      [] { find_checkpoint("owner/model", "step1"); });
  expect_error(ErrorKind::not_found, {"--revision 'a$b' "},
               [] { find_checkpoint("owner/model", "a$b"); });
}

TEST_F(HubCache, NamesWhatIsMissingOfASnapshot) {
  const auto expect_missing = [&](const std::string& file) {
    expect_error(
        ErrorKind::not_found,
        {snapshot(kCommit).string(), "incomplete", "no " + file, "hf download owner/model "},
        [] { find_checkpoint("owner/model"); });
  };
  std::filesystem::remove(model() / "blobs" / (kCommit + "-model.safetensors"));
  expect_missing("model.safetensors");
  std::filesystem::remove(snapshot(kCommit) / "model.safetensors");
  expect_missing("model.safetensors");
  add_file(kCommit, "pytorch_model.bin.index.json",
           R"({"weight_map": {"a": "1.bin", "b": "2.bin"}})");
  expect_missing("1.bin");
  add_file(kCommit, "1.bin", "");
  expect_missing("2.bin");
  add_file(kCommit, "2.bin", "");
  EXPECT_EQ(find_checkpoint("owner/model"), snapshot(kCommit));
  std::filesystem::remove(snapshot(kCommit) / "config.json");
  expect_missing("config.json");
  EXPECT_EQ(find_checkpoint("owner/model", "", CheckpointFiles::tokenizer), snapshot(kCommit));
  std::filesystem::remove(snapshot(kCommit) / "tokenizer.json");
  expect_error(ErrorKind::not_found, {"incomplete", "no tokenizer.json"},
               [] { find_checkpoint("owner/model", "", CheckpointFiles::tokenizer); });
}

TEST_F(HubCache, RefusesRevisionsThatLeadElsewhere) {
  for (const std::string& revision :
       {std::string("../snapshots"), std::string("/etc"), std::string("a/../b"), std::string(".."),
        std::string("-x"), std::string("."), std::string("a/."), std::string("a b"),
        std::string("a\nb"), std::string("a\\b")}) {
    expect_error(ErrorKind::invalid_argument, {"revision", "branch"},
                 [&] { find_checkpoint("owner/model", revision); });
  }
  for (const std::string& commit : {std::string("../../.."), std::string(""), std::string("a/b")}) {
    add_ref("bent", commit);
    expect_error(ErrorKind::malformed, {(model() / "refs/bent").string(), "commit hash"},
                 [] { find_checkpoint("owner/model", "bent"); });
  }
}

}  // namespace
}  // namespace clusterfusion
