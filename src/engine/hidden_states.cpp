#include "engine/hidden_states.hpp"

#include <algorithm>

#include "base/fail.hpp"
#include "engine/activation_names.hpp"
#include "engine/prepare_request.hpp"

namespace clusterfusion {

std::vector<NamedActivation> compute_hidden_states(SharedBackend& backend,
                                                   std::span<const TokenId> tokens,
                                                   const HiddenStatesOptions& options) {
  const ModelConfig& config = backend.model().config();
  const std::vector<NamedSite> sites = sites_of(options, config);
  require(!tokens.empty(), ErrorKind::invalid_argument,
          "hidden states need at least 1 token, got none");
  check_tokens(tokens, config.vocab_size, "tokens");
  const std::int64_t longest = backend.info().max_positions;
  require(std::ssize(tokens) <= longest, ErrorKind::invalid_argument,
          "there are {} tokens, and the context holds {}; pass fewer", tokens.size(), longest);

  std::vector<NamedActivation> results;
  std::vector<ActivationOutput> outputs;  // each site once
  for (const NamedSite& named : sites) {
    const auto known = std::ranges::find(sites, named.site, &NamedSite::site) - sites.begin();
    if (known < std::ssize(results)) {
      results.push_back({named.name, results[static_cast<std::size_t>(known)].values});
      continue;
    }
    const std::shared_ptr<DLTensor> values = backend.run([&](Backend& device) {
      return device.allocate_activation(std::ssize(tokens), config.hidden_size);
    });
    outputs.push_back({named.site, static_cast<float*>(values->data)});
    results.push_back({named.name, values});
  }

  const SequenceHandle sequence(backend, {}, std::ssize(tokens));
  const auto piece = static_cast<std::size_t>(backend.info().prefill_chunk);
  for (std::size_t begin = 0; begin < tokens.size(); begin += piece) {
    PrefillOutput output;
    output.activations = rows_from(static_cast<std::int64_t>(begin), config.hidden_size, outputs);
    backend.run([&](Backend& device) {
      device.prefill(sequence.id(), tokens.subspan(begin, std::min(piece, tokens.size() - begin)),
                     output);
    });
  }
  return results;
}

}  // namespace clusterfusion
