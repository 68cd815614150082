// What tests of files need: a folder that goes away, safetensors files that may lie, and a check of
// an error's words.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/error.hpp"

namespace clusterfusion::test {

// A new folder, removed with all that is in it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "clusterfusion-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const std::string& name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

// The first bytes of a safetensors file: the header's length and the header.
inline std::string safetensors_head(const std::string& header) {
  std::string head;
  for (int i = 0; i < 8; ++i) {
    head += static_cast<char>(static_cast<std::uint64_t>(header.size()) >> (8 * i));
  }
  return head + header;
}

struct RawTensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string data;
};

// A well-formed file with these tensors, back to back; the data start at a multiple of 8 bytes.
inline std::string safetensors_file(const std::vector<RawTensor>& tensors) {
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const RawTensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.data.size()}}};
    data += tensor.data;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return safetensors_head(text) + data;
}

// Expects that `action` throws an Error of `kind` whose message has all of `words` in it.
template <typename Action>
void expect_error(ErrorKind kind, const std::vector<std::string>& words, const Action& action) {
  try {
    action();
    FAIL() << "no error; expected one with: " << ::testing::PrintToString(words);
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(kind)) << error.what();
    for (const std::string& word : words) EXPECT_THAT(error.what(), ::testing::HasSubstr(word));
  }
}

}  // namespace clusterfusion::test
