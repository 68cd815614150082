// What families read their config.json with. Each function sets what it names in `config`; a key is
// what the family calls it, a default what a missing one means. Errors: malformed, unsupported.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"
#include "io/json.hpp"

namespace clusterfusion {

// The largest number of tokens or positions.
inline constexpr std::int64_t kMaxTokens = (std::int64_t{1} << 31) - 1;

bool boolean_or(const JsonObject& root, std::string_view key, bool fallback);
double number_or(const JsonObject& root, std::string_view key, NumberRange range, double fallback);

// Of a head: hidden_size / num_attention_heads, or what `head_dim` says if it says something.
enum class HeadDim { shared_out, own };

// What missing keys mean.
struct SizeDefaults {
  std::int64_t max_positions = 2048;
  HeadDim head_dim = HeadDim::shared_out;
  std::int64_t head_size = 0;  // 0: shared out
};

// Sizes of the model and of its heads, none of them grouped, and the longest context.
void read_sizes(const JsonObject& root, ModelConfig& config, const SizeDefaults& defaults = {});

// Heads of keys and values. `missing`: how many there are if the key is missing; 0, or if it is
// null: as many as of queries. After read_sizes().
void read_kv_heads(const JsonObject& root, std::string_view key, ModelConfig& config,
                   std::int64_t missing = 0);

// Of versions of transformers before 5, which has `rope_parameters` for all families.
struct RopeKeys {
  std::string_view theta;
  double default_theta;
  std::string_view fraction;  // of a head that is rotated, rounded down
  double default_fraction;
  bool takes_scaling = false;  // the kinds of RopeKind; else only "default"
};
void read_rope(const JsonObject& root, const std::string& file, const RopeKeys& keys,
               ModelConfig& config);

struct SpecialTokens {
  std::optional<TokenId> bos, eos;
};
void read_special_tokens(const JsonObject& root, SpecialTokens defaults, ModelConfig& config);

void read_activation(const JsonObject& root, std::string_view key, std::string_view fallback,
                     const std::string& file, ModelConfig& config);

TokenId parse_token(const JsonValue& value, const ModelConfig& config);
// null, a token id, or a list of them.
std::vector<TokenId> parse_tokens(const JsonValue& value, const ModelConfig& config);

}  // namespace clusterfusion
