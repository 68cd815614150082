// Results of the layer calls, of which torch makes many at once.
//
// A tensor with memory of its own costs torch several times as much as a part of another one, so
// for each result of a kind of call a block for many is made and cut up, and the parts wait in the
// tuples that calls return. Each result has its own version counter, but the memory of a block
// lives as long as any of its results.
#pragma once

#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace clusterfusion::python {

// The shape of a result, of one to three dimensions.
struct ResultShape {
  static constexpr std::size_t kMaxDimensions = 3;

  std::size_t dimensions = 0;
  std::array<std::int64_t, kMaxDimensions> sizes{};

  bool operator==(const ResultShape&) const = default;
};

// What calls must have in common for their results to be of the same blocks.
struct ResultKind {
  static constexpr std::size_t kMaxResults = 4;

  unsigned long thread;
  void* stream;  // on which the blocks' memory may be used at once
  DLDevice device;
  DLDataType dtype;
  bool inference;  // made in torch's inference mode
  std::size_t count = 0;
  std::array<ResultShape, kMaxResults> shapes{};

  bool operator==(const ResultKind& other) const {
    return shapes == other.shapes && count == other.count && thread == other.thread &&
           stream == other.stream && device.device_type == other.device.device_type &&
           device.device_id == other.device.device_id && dtype.code == other.dtype.code &&
           dtype.bits == other.dtype.bits && dtype.lanes == other.dtype.lanes &&
           inference == other.inference;
  }

  void add(const ResultShape& shape) { shapes.at(count++) = shape; }

  std::size_t bytes(std::size_t result) const {
    std::size_t bytes = dtype.bits / 8u * dtype.lanes;
    const ResultShape& shape = shapes.at(result);
    for (std::size_t i = 0; i < shape.dimensions; ++i) {
      bytes *= static_cast<std::size_t>(shape.sizes[i]);
    }
    return bytes;
  }
};

// The results of one call.
struct ResultSet {
  Owned tuple;
  std::array<std::byte*, ResultKind::kMaxResults> data{};

  // Valid as long as the set and `kind`.
  DLTensor view(ResultKind& kind, std::size_t result) const {
    ResultShape& shape = kind.shapes.at(result);
    DLTensor view{};
    view.data = data.at(result);
    view.device = kind.device;
    view.dtype = kind.dtype;
    view.ndim = static_cast<int>(shape.dimensions);
    view.shape = shape.sizes.data();
    return view;
  }
};

// What makes tensors and looks at them.
struct TensorMakers {
  PyObject* new_empty = nullptr;  // torch.Tensor.new_empty
  PyObject* split = nullptr;      // torch.unsafe_split_with_sizes
  // Where a plain tensor's elements lie; Unusual for any other object.
  std::byte* (*data_of)(PyObject* tensor) = nullptr;
};

// like.new_empty(*shape)
inline Owned new_empty(const TensorMakers& make, PyObject* like, const ResultShape& shape) {
  std::array<Owned, ResultShape::kMaxDimensions> sizes;  // null ends the list of arguments
  for (std::size_t i = 0; i < shape.dimensions; ++i) {
    sizes.at(i) = own(PyLong_FromLongLong(shape.sizes[i]));
  }
  return own(PyObject_CallFunctionObjArgs(make.new_empty, like, sizes[0].get(), sizes[1].get(),
                                          sizes[2].get(), nullptr));
}

// Results with memory of their own, of the dtype and on the device of `like`.
inline ResultSet new_results(const TensorMakers& make, const ResultKind& kind, PyObject* like) {
  ResultSet set{own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)))};
  for (std::size_t i = 0; i < kind.count; ++i) {
    Owned result = new_empty(make, like, kind.shapes.at(i));
    set.data.at(i) = make.data_of(result.get());
    PyTuple_SetItem(set.tuple.get(), static_cast<Py_ssize_t>(i), result.release());
  }
  return set;
}

// To be used, and kept until the process ends, under the GIL. While torch makes tensors, other
// threads may use it too.
class ResultStock {
 public:
  // Results of this kind, of the dtype and on the device of `like`.
  ResultSet take(const TensorMakers& make, const ResultKind& kind, PyObject* like) {
    if (Shelf* shelf = find(kind); shelf != nullptr && !shelf->sets.empty()) {
      ResultSet set = std::move(shelf->sets.back());
      shelf->sets.pop_back();
      return set;
    }
    if (!can_be_cut(kind)) return new_results(make, kind, like);
    std::vector<ResultSet> sets = make_sets(make, kind, like);
    ResultSet first = std::move(sets.back());
    sets.pop_back();
    put(kind, sets);  // `sets` may now be others, which go when the stock is in order
    return first;
  }

 private:
  static constexpr std::size_t kSets = 32;

  struct Shelf {
    ResultKind kind;
    std::vector<ResultSet> sets;
  };

  Shelf* find(const ResultKind& kind) {
    const auto found = std::find_if(shelves_.begin(), shelves_.end(),
                                    [&](const Shelf& shelf) { return shelf.kind == kind; });
    return found == shelves_.end() ? nullptr : &*found;
  }

  // Whether each result begins as a tensor of its own would for all who load vectors.
  static bool can_be_cut(const ResultKind& kind) {
    constexpr std::size_t kAlignment = 64;
    for (std::size_t i = 0; i < kind.count; ++i) {
      if (kind.bytes(i) == 0 || kind.bytes(i) % kAlignment != 0) return false;
    }
    return true;
  }

  // Puts the sets on their shelf in exchange for what there is. The oldest shelf makes room.
  void put(const ResultKind& kind, std::vector<ResultSet>& sets) {
    constexpr std::size_t kMostShelves = 32;
    Shelf* shelf = find(kind);
    if (shelf == nullptr && shelves_.size() < kMostShelves) {
      shelf = &shelves_.emplace_back(Shelf{kind, {}});
    } else if (shelf == nullptr) {
      std::rotate(shelves_.begin(), shelves_.begin() + 1, shelves_.end());
      shelf = &shelves_.back();
      shelf->kind = kind;
    }
    std::swap(shelf->sets, sets);
  }

  static std::vector<ResultSet> make_sets(const TensorMakers& make, const ResultKind& kind,
                                          PyObject* like) {
    std::vector<ResultSet> sets(kSets);
    for (ResultSet& set : sets) set.tuple = own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)));
    for (std::size_t result = 0; result < kind.count; ++result) {
      const Owned parts = make_parts(make, kind.shapes.at(result), like);
      const auto part = [&](std::size_t i) {
        return own(PySequence_GetItem(parts.get(), static_cast<Py_ssize_t>(i)));
      };
      // A mode of torch may have made other tensors, which must not stay in stock.
      std::byte* const begin = make.data_of(part(0).get());
      const std::size_t bytes = kind.bytes(result);
      if (PySequence_Size(parts.get()) != static_cast<Py_ssize_t>(kSets) ||
          make.data_of(part(kSets - 1).get()) != begin + (kSets - 1) * bytes) {
        throw Unusual{};
      }
      for (std::size_t i = 0; i < kSets; ++i) {
        sets[i].data.at(result) = begin + i * bytes;
        PyTuple_SetItem(sets[i].tuple.get(), static_cast<Py_ssize_t>(result), part(i).release());
      }
    }
    return sets;
  }

  // A sequence of kSets tensors that lie one behind the other.
  static Owned make_parts(const TensorMakers& make, ResultShape shape, PyObject* like) {
    const Owned rows = own(PyLong_FromLongLong(shape.sizes[0]));
    const Owned sizes = own(PyTuple_New(kSets));
    for (std::size_t i = 0; i < kSets; ++i) {
      PyTuple_SetItem(sizes.get(), static_cast<Py_ssize_t>(i), share(rows.get()).release());
    }
    shape.sizes[0] *= static_cast<std::int64_t>(kSets);
    const Owned block = new_empty(make, like, shape);
    // What this makes are no views for autograd. torch.unsafe_split takes half as long again.
    return own(PyObject_CallFunctionObjArgs(make.split, block.get(), sizes.get(), nullptr));
  }

  std::vector<Shelf> shelves_;
};

}  // namespace clusterfusion::python
