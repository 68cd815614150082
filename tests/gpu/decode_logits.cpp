// Writes logits of a checkpoint on the GPU, for tests that compare them with another program's.
//   decode_logits MODEL TOKENS OUT PREFILL+DECODE ...
// TOKENS: int32 ids. For each PREFILL+DECODE, as "2046+1": prefills the first PREFILL tokens,
// decodes the next DECODE ones, one a step, and appends to OUT the float32 logits [vocab] after the
// last.
#include <fmt/format.h>

#include <cstdio>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "base/fail.hpp"

using namespace clusterfusion;

namespace {

std::vector<TokenId> read_tokens(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  require(file.good(), ErrorKind::not_found, "{} cannot be read", path);
  std::vector<TokenId> tokens(static_cast<std::size_t>(file.tellg()) / sizeof(TokenId));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(tokens.data()),
            static_cast<std::streamsize>(tokens.size() * sizeof(TokenId)));
  return tokens;
}

struct Lengths {
  std::size_t prefill = 0, decode = 0;
};

Lengths parse_lengths(const std::string& text, std::size_t available) {
  Lengths lengths;
  char rest = 0;
  const int read = std::sscanf(text.c_str(), "%zu+%zu%c", &lengths.prefill, &lengths.decode, &rest);
  require(read == 2, ErrorKind::invalid_argument, "expected PREFILL+DECODE, found {}", text);
  const std::size_t total = lengths.prefill + lengths.decode;
  require(total >= 1 && total <= available, ErrorKind::invalid_argument,
          "{}: expected 1 to {} tokens in all", text, available);
  return lengths;
}

std::vector<float> logits_after(Backend& backend, std::int64_t vocab,
                                std::span<const TokenId> tokens, Lengths lengths) {
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  const SequenceId id = backend.create_sequence({});
  const auto chunk = static_cast<std::size_t>(backend.info().prefill_chunk);
  for (std::size_t done = 0; done < lengths.prefill; done += chunk) {
    PrefillOutput output;
    if (done + chunk >= lengths.prefill) output.last_logits = logits;
    backend.prefill(id, tokens.subspan(done, std::min(chunk, lengths.prefill - done)), output);
  }
  for (std::size_t i = lengths.prefill; i < lengths.prefill + lengths.decode; ++i)
    backend.decode(std::vector{id}, tokens.subspan(i, 1), 1, {}, logits);
  backend.release_sequence(id);
  return logits;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  require(arguments.size() >= 4, ErrorKind::invalid_argument,
          "usage: decode_logits MODEL TOKENS OUT PREFILL+DECODE ...");
  const auto model = Model::open(arguments[0]);
  const auto tokens = read_tokens(arguments[1]);
  std::ofstream out(arguments[2], std::ios::binary);
  const auto backend = make_cuda_backend(model, {});
  for (const std::string& argument : std::span(arguments).subspan(3)) {
    const auto logits = logits_after(*backend, model->config().vocab_size, tokens,
                                     parse_lengths(argument, tokens.size()));
    out.write(reinterpret_cast<const char*>(logits.data()),
              static_cast<std::streamsize>(logits.size() * sizeof(float)));
  }
  out.flush();
  require(out.good(), ErrorKind::io, "{} cannot be written", arguments[2]);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "decode_logits: {}\n", error.what());
  return 1;
}
