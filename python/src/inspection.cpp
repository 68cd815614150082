// Looking inside and steering, for Python.
#include <tvm/ffi/container/array.h>

#include <string>
#include <vector>

#include "base/fail.hpp"
#include "clusterfusion/engine.hpp"
#include "convert.hpp"
#include "export.hpp"
#include "objects.hpp"

namespace clusterfusion::python {
namespace {

std::vector<std::int64_t> to_vector(const ffi::Array<std::int64_t>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// The same memory as a tensor of tvm-ffi, which keeps it alive.
ffi::Tensor shared_tensor(std::shared_ptr<const DLTensor> values) {
  struct Owner {
    std::shared_ptr<const DLTensor> values;
    void AllocData(DLTensor* tensor) { tensor->data = values->data; }
    void FreeData(DLTensor*) {}
  };
  const ffi::Shape shape({values->shape[0], values->shape[1]});
  const DLDevice device{static_cast<DLDeviceType>(values->device.device_type),
                        values->device.device_id};
  return ffi::Tensor::FromNDAlloc(Owner{std::move(values)}, shape, DLDataType{kDLFloat, 32, 1},
                                  device);
}

// [(name, tensor)]
ffi::Array<ffi::Any> engine_hidden_states(EngineRef engine, ffi::TensorView tokens,
                                          ffi::Array<ffi::String> at,
                                          ffi::Optional<ffi::Array<std::int64_t>> layers) {
  HiddenStatesOptions options;
  options.at.assign(at.begin(), at.end());
  if (layers) options.layers = to_vector(*layers);
  ffi::Array<ffi::Any> results;
  for (NamedActivation& activation : engine->engine->hidden_states(tokens_of(tokens), options)) {
    results.push_back(ffi::Array<ffi::Any>{ffi::String(activation.name),
                                           shared_tensor(std::move(activation.values))});
  }
  return results;
}

// values[i]: float32 [hidden] or [positions, hidden], of layers[i].
void engine_steer(EngineRef engine, ffi::Array<std::int64_t> layers, ffi::Array<ffi::Tensor> values,
                  double scale) {
  std::vector<SteeringVector> vectors;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const ffi::Tensor tensor = values[static_cast<std::int64_t>(i)];
    const auto* first = static_cast<const float*>(tensor.data_ptr());
    SteeringVector vector;
    vector.layer = layers[static_cast<std::int64_t>(i)];
    vector.positions = tensor.ndim() == 2 ? tensor.size(0) : 0;
    vector.values.assign(first, first + tensor.numel());
    vectors.push_back(std::move(vector));
  }
  engine->engine->steer(std::move(vectors), static_cast<float>(scale));
}

// heads[i] are those of layer layers[i].
void engine_ablate(EngineRef engine, ffi::Array<std::int64_t> layers,
                   ffi::Array<ffi::Array<std::int64_t>> heads, ffi::Array<std::int64_t> mlps) {
  Ablation ablation;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    ablation.heads[layers[at]] = to_vector(heads[at]);
  }
  ablation.mlps = to_vector(mlps);
  engine->engine->ablate(ablation);
}

CLUSTERFUSION_EXPORT(engine_hidden_states)
CLUSTERFUSION_EXPORT(engine_steer)
CLUSTERFUSION_EXPORT(engine_ablate)

}  // namespace
}  // namespace clusterfusion::python
