// The tokenizer behind pipes, for programs that compare it with another one.
//
//   tokenizer_tool FILE encode     strings -> ids, with the post-processor's tokens
//   tokenizer_tool FILE tokens     strings -> ids, without
//   tokenizer_tool FILE decode     ids -> strings, special tokens left out
//   tokenizer_tool FILE all        ids -> strings, special tokens kept
//   tokenizer_tool FILE stream     as decode, token by token
//   tokenizer_tool FILE stream-all as all, token by token
//   tokenizer_tool FILE time N     strings -> N times the CPU seconds of encoding them all, as
//   float64
//
// Everything is little-endian. A list is its length (uint32) and its elements: bytes of a string,
// or int32 ids. Lists are read from stdin until its end and written to stdout in the same order.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/error.hpp"
#include "clusterfusion/tokenizer.hpp"

namespace {

using clusterfusion::TokenId;
using clusterfusion::Tokenizer;

void write_bytes(const void* data, std::size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes)
    throw std::runtime_error("stdout: write failed");
}

template <typename List>
void write_list(const List& list) {
  const auto length = static_cast<std::uint32_t>(list.size());
  write_bytes(&length, sizeof(length));
  write_bytes(list.data(), list.size() * sizeof(list[0]));
}

// The next list of stdin, or nothing at its end.
template <typename List>
std::optional<List> read_list() {
  std::uint32_t length = 0;
  if (std::fread(&length, 1, sizeof(length), stdin) != sizeof(length)) return std::nullopt;
  List list;
  list.resize(length);
  if (std::fread(list.data(), sizeof(list[0]), length, stdin) != length) {
    throw std::runtime_error("stdin: ends inside a list");
  }
  return list;
}

std::string streamed(const std::shared_ptr<const Tokenizer>& tokenizer,
                     const std::vector<TokenId>& tokens, bool skip_special_tokens) {
  clusterfusion::StreamDecoder decoder(tokenizer, skip_special_tokens);
  std::string text;
  for (const TokenId token : tokens) text += decoder.push(token);
  return text + decoder.finish();
}

double seconds_to_encode(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
  const std::clock_t start = std::clock();
  std::size_t tokens = 0;
  for (const std::string& text : texts) tokens += tokenizer.encode(text).size();
  const std::clock_t end = std::clock();
  if (tokens == 0) throw std::runtime_error("stdin: texts without a token cannot be timed");
  return static_cast<double>(end - start) / CLOCKS_PER_SEC;
}

void time_encoding(const Tokenizer& tokenizer, int repeats) {
  std::vector<std::string> texts;
  while (auto text = read_list<std::string>()) texts.push_back(std::move(*text));
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(seconds_to_encode(tokenizer, texts));
  write_list(seconds);
}

int run(const std::string& file, std::string_view mode, int repeats) {
  const std::shared_ptr<const Tokenizer> tokenizer = Tokenizer::open(file);
  if (mode == "encode" || mode == "tokens") {
    while (const auto text = read_list<std::string>()) {
      write_list(tokenizer->encode(*text, mode == "encode"));
    }
  } else if (mode == "decode" || mode == "all") {
    while (const auto tokens = read_list<std::vector<TokenId>>()) {
      write_list(tokenizer->decode(*tokens, mode == "decode"));
    }
  } else if (mode == "stream" || mode == "stream-all") {
    while (const auto tokens = read_list<std::vector<TokenId>>()) {
      write_list(streamed(tokenizer, *tokens, mode == "stream"));
    }
  } else if (mode == "time" && repeats > 0) {
    time_encoding(*tokenizer, repeats);
  } else {
    throw std::runtime_error(
        "MODE must be encode, tokens, decode, all, stream, stream-all or time N");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fputs("usage: tokenizer_tool FILE encode|tokens|decode|all|stream|stream-all|time [N]\n",
               stderr);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tokenizer_tool: %s\n", error.what());
    return 1;
  }
}
