// Results of the layer calls, of which torch makes many at once.
//
// A tensor with memory of its own costs torch several times as much as a part of another one,
// so a block for many results is made and cut up. Each result has its own version counter, but the
// memory of a block lives as long as any of its results.
#pragma once

#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

namespace clusterfusion::python {

// What results must have in common to be of one block. A shape may have up to three dimensions.
struct ResultKind {
  static constexpr std::size_t kMaxDimensions = 3;

  unsigned long thread;
  void* stream;  // on which the block's memory may be used at once
  DLDevice device;
  DLDataType dtype;
  bool inference;  // made in torch's inference mode
  std::size_t dimensions = 0;
  std::array<std::int64_t, kMaxDimensions> sizes{};

  bool operator==(const ResultKind& other) const {
    return sizes == other.sizes && dimensions == other.dimensions && thread == other.thread &&
           stream == other.stream && device.device_type == other.device.device_type &&
           device.device_id == other.device.device_id && dtype.code == other.dtype.code &&
           dtype.bits == other.dtype.bits && dtype.lanes == other.dtype.lanes &&
           inference == other.inference;
  }

  std::span<const std::int64_t> shape() const { return {sizes.data(), dimensions}; }

  std::int64_t bytes() const {
    std::int64_t bytes = dtype.bits / 8 * dtype.lanes;
    for (const std::int64_t size : shape()) bytes *= size;
    return bytes;
  }
};

// The functions of torch that make tensors.
struct TensorMakers {
  PyObject* tensor = nullptr;     // torch.Tensor, their type
  PyObject* new_empty = nullptr;  // torch.Tensor.new_empty
  PyObject* split = nullptr;      // torch.unsafe_split_with_sizes
};

// like.new_empty(*shape)
inline Owned new_empty(const TensorMakers& make, PyObject* like,
                       std::span<const std::int64_t> shape) {
  std::array<Owned, ResultKind::kMaxDimensions> sizes;  // null ends the list of arguments
  for (std::size_t i = 0; i < shape.size(); ++i) sizes.at(i) = own(PyLong_FromLongLong(shape[i]));
  return own(PyObject_CallFunctionObjArgs(make.new_empty, like, sizes[0].get(), sizes[1].get(),
                                          sizes[2].get(), nullptr));
}

// To be used, and kept until the process ends, under the GIL. While torch makes tensors, other
// threads may use it too.
class ResultStock {
 public:
  // A result of this kind, of the dtype and on the device of `like`.
  Owned take(const TensorMakers& make, const ResultKind& kind, PyObject* like) {
    // Each begins as a tensor of its own would for all who load vectors.
    constexpr std::int64_t kAlignment = 64;
    if (kind.bytes() == 0 || kind.bytes() % kAlignment != 0) {
      return new_empty(make, like, kind.shape());
    }
    if (Shelf* shelf = find(kind); shelf != nullptr && !shelf->results.empty()) {
      return take_from(*shelf);
    }
    std::vector<Owned> results = make_block(make, kind, like);
    Owned first = std::move(results.back());
    results.pop_back();
    put(kind, results);  // `results` may now be others, which go when the stock is in order
    return first;
  }

 private:
  struct Shelf {
    ResultKind kind;
    std::vector<Owned> results;
  };

  Shelf* find(const ResultKind& kind) {
    const auto found = std::find_if(shelves_.begin(), shelves_.end(),
                                    [&](const Shelf& shelf) { return shelf.kind == kind; });
    return found == shelves_.end() ? nullptr : &*found;
  }

  static Owned take_from(Shelf& shelf) {
    Owned result = std::move(shelf.results.back());
    shelf.results.pop_back();
    return result;
  }

  // Puts the results on their shelf in exchange for what there is. The oldest shelf makes room.
  void put(const ResultKind& kind, std::vector<Owned>& results) {
    constexpr std::size_t kMostShelves = 32;
    Shelf* shelf = find(kind);
    if (shelf == nullptr && shelves_.size() < kMostShelves) {
      shelf = &shelves_.emplace_back(Shelf{kind, {}});
    } else if (shelf == nullptr) {
      std::rotate(shelves_.begin(), shelves_.begin() + 1, shelves_.end());
      shelf = &shelves_.back();
      shelf->kind = kind;
    }
    std::swap(shelf->results, results);
  }

  static std::vector<Owned> make_block(const TensorMakers& make, const ResultKind& kind,
                                       PyObject* like) {
    constexpr std::int64_t kResults = 32;
    std::vector<std::int64_t> shape(kind.shape().begin(), kind.shape().end());
    const Owned rows = own(PyLong_FromLongLong(shape[0]));
    const Owned sizes = own(PyTuple_New(kResults));
    for (Py_ssize_t i = 0; i < kResults; ++i) {
      PyTuple_SetItem(sizes.get(), i, share(rows.get()).release());
    }
    shape[0] *= kResults;
    const Owned block = new_empty(make, like, shape);
    // What this makes are no views for autograd. torch.unsafe_split takes half as long again.
    const Owned parts =
        own(PyObject_CallFunctionObjArgs(make.split, block.get(), sizes.get(), nullptr));
    std::vector<Owned> results;
    for (Py_ssize_t i = 0; i < PyTuple_Size(parts.get()); ++i) {
      results.push_back(share(PyTuple_GetItem(parts.get(), i)));
    }
    if (results.size() != kResults) throw Unusual{};
    // A mode of torch may have made others, which must not stay in stock.
    if (reinterpret_cast<PyObject*>(Py_TYPE(results.front().get())) != make.tensor) throw Unusual{};
    return results;
  }

  std::vector<Shelf> shelves_;
};

}  // namespace clusterfusion::python
