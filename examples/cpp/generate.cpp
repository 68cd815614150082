// generate FOLDER PROMPT: streams the continuation of a prompt.
#include <clusterfusion/engine.hpp>
#include <clusterfusion/error.hpp>
#include <cstdio>

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: %s FOLDER PROMPT\n", argv[0]), 2;
  const auto engine = clusterfusion::Engine::open(argv[1]);

  clusterfusion::GenerateRequest request;
  request.prompt = argv[2];
  request.max_new_tokens = 100;
  request.sampling = {.temperature = 0.8f, .top_p = 0.95f, .seed = 1};

  const auto result = engine->generate(request, [](const clusterfusion::GenerateEvent& event) {
    std::fputs(event.text.c_str(), stdout);
    return std::fflush(stdout) == 0;  // false cancels
  });
  std::fprintf(stderr, "\n%.1f tokens/s\n", result.statistics.tokens_per_second);
} catch (const clusterfusion::Error& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
