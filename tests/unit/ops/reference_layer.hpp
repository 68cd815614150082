// A decoder layer in float64, for one new token on the tensors of a LayerFixture.
//
// The new key and value are rounded to the tensors' dtype before attention sees them, because the
// cache holds them so; nothing else is. It shares no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "layer_fixture.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {

using Values = std::vector<double>;

inline Values values_of(OwnedTensor& tensor, std::int64_t begin, std::int64_t count) {
  Values values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    values[static_cast<std::size_t>(i)] = tensor.at(begin + i);
  return values;
}

inline Values values_of(OwnedTensor& tensor) { return values_of(tensor, 0, tensor.count()); }

inline Values rounded(const Values& values, DType dtype) {
  Values out;
  for (const double v : values) out.push_back(widen(narrow(static_cast<float>(v), dtype), dtype));
  return out;
}

struct Reference {
  Values attention, intermediate, output, keys, values;
};

class ReferenceLayer {
 public:
  // Computes what does not depend on the position. Leave out biases that the call does not have.
  ReferenceLayer(LayerFixture& layer, DType dtype, bool attention_biases = true)
      : layer_(layer), biases_(attention_biases) {
    const Values x = values_of(layer["input"]);
    const Values qkv =
        linear("weight_qkv", biases_ ? "bias_qkv" : nullptr, normalized("ln_weight", "ln_bias", x));
    const auto dim = static_cast<std::size_t>(layer.sizes.head_dim());
    for (std::int64_t head = 0; head < layer.sizes.num_heads; ++head) {
      const auto part = [&](std::size_t which) {
        const double* begin = qkv.data() + (static_cast<std::size_t>(head) * 3 + which) * dim;
        return Values(begin, begin + dim);
      };
      append(queries_, rotated(part(0)));
      append(keys_, rotated(part(1)));
      append(values_, part(2));
    }
    cached_keys_ = rounded(keys_, dtype);
    cached_values_ = rounded(values_, dtype);
    intermediate_ =
        linear("mlp_up_weight", "mlp_up_bias", normalized("post_ln_weight", "post_ln_bias", x));
    for (double& v : intermediate_) v = reference_activation(layer.options.activation, v);
    down_ = linear("mlp_down_weight", "mlp_down_bias", intermediate_);
  }

  // What the layer gives for a token at `position`.
  Reference at(std::int64_t position) {
    Reference result{linear("weight_o", biases_ ? "bias_o" : nullptr, attended(position)),
                     intermediate_, down_, keys_, values_};
    const Values x = values_of(layer_["input"]);
    for (std::size_t i = 0; i < x.size(); ++i) result.output[i] += x[i] + result.attention[i];
    return result;
  }

  // What mlp_down gives for these results of a first half.
  Values output_of(const Values& attention, const Values& intermediate) {
    Values output = linear("mlp_down_weight", "mlp_down_bias", intermediate);
    const Values x = values_of(layer_["input"]);
    for (std::size_t i = 0; i < x.size(); ++i) output[i] += x[i] + attention[i];
    return output;
  }

 private:
  static void append(Values& all, const Values& more) {
    all.insert(all.end(), more.begin(), more.end());
  }

  // `bias` may be null.
  Values linear(const char* weight, const char* bias, const Values& in) {
    OwnedTensor& matrix = layer_[weight];
    const auto rows = static_cast<std::size_t>(matrix.count()) / in.size();
    Values out = bias != nullptr ? values_of(layer_[bias]) : Values(rows);
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t k = 0; k < in.size(); ++k)
        out[row] += matrix.at(static_cast<std::int64_t>(row * in.size() + k)) * in[k];
    return out;
  }

  Values normalized(const char* weight, const char* bias, const Values& x) {
    const auto n = static_cast<double>(x.size());
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / n;
    for (const double v : x) variance += (v - mean) * (v - mean) / n;
    Values out = values_of(layer_[bias]);
    const Values gain = values_of(layer_[weight]);
    for (std::size_t i = 0; i < x.size(); ++i)
      out[i] += (x[i] - mean) / std::sqrt(variance + layer_.options.layer_norm_eps) * gain[i];
    return out;
  }

  Values rotated(Values head) {
    const auto half = static_cast<std::size_t>(layer_.sizes.rotary_dim / 2);
    const Values before = head;
    for (std::size_t i = 0; i < 2 * half; ++i) {
      const double other = i < half ? -before[i + half] : before[i - half];
      const auto at = static_cast<std::int64_t>(i);
      head[i] = before[i] * layer_["cos"].at(at) + other * layer_["sin"].at(at);
    }
    return head;
  }

  // Softmax over the caches' rows before `position` and the new key and value, all heads.
  Values attended(std::int64_t position) {
    const auto dim = static_cast<std::size_t>(layer_.sizes.head_dim());
    const auto hidden = static_cast<std::size_t>(layer_.sizes.hidden);
    OwnedTensor& keys = layer_["k_cache"];
    OwnedTensor& values = layer_["v_cache"];
    Values out(hidden);
    for (std::size_t first = 0; first < hidden; first += dim) {
      Values weights;
      for (std::int64_t p = 0; p <= position; ++p) {
        double score = 0;
        for (std::size_t i = first; i < first + dim; ++i)
          score += queries_[i] *
                   (p < position ? keys.at(p * layer_.sizes.hidden + static_cast<std::int64_t>(i))
                                 : cached_keys_[i]);
        weights.push_back(score / std::sqrt(static_cast<double>(dim)));
      }
      const double largest = *std::max_element(weights.begin(), weights.end());
      double sum = 0;
      for (double& w : weights) sum += w = std::exp(w - largest);
      for (std::int64_t p = 0; p <= position; ++p)
        for (std::size_t i = first; i < first + dim; ++i)
          out[i] +=
              weights[static_cast<std::size_t>(p)] / sum *
              (p < position ? values.at(p * layer_.sizes.hidden + static_cast<std::int64_t>(i))
                            : cached_values_[i]);
    }
    return out;
  }

  LayerFixture& layer_;
  bool biases_;
  Values queries_, keys_, values_, cached_keys_, cached_values_, intermediate_, down_;
};

}  // namespace clusterfusion::test
