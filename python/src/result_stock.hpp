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

#include "base/tensor_view.hpp"

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
           stream == other.stream && same_device(device, other.device) &&
           same_dtype(dtype, other.dtype) && inference == other.inference;
  }

  void add(const ResultShape& shape) { shapes.at(count++) = shape; }

  // Of one result. Only for sizes that may be in stock: those of others may not fit.
  std::size_t bytes(std::size_t result) const {
    std::size_t bytes = dtype.bits / 8u * dtype.lanes;
    for (const std::int64_t size : sizes(result)) bytes *= static_cast<std::size_t>(size);
    return bytes;
  }

  std::span<const std::int64_t> sizes(std::size_t result) const {
    const ResultShape& shape = shapes.at(result);
    return {shape.sizes.data(), shape.dimensions};
  }

  // Whether a tensor is a contiguous one such as this result, wherever it lies.
  bool fits(const DLTensor& tensor, std::size_t result) const {
    const std::span expected = sizes(result);
    const std::span found(tensor.shape, static_cast<std::size_t>(tensor.ndim));
    return same_device(tensor.device, device) && same_dtype(tensor.dtype, dtype) &&
           std::equal(found.begin(), found.end(), expected.begin(), expected.end()) &&
           is_contiguous(tensor);
  }
};

// The results of one call.
struct ResultSet {
  Owned tuple;
  std::array<const std::byte*, ResultKind::kMaxResults> data{};

  // Valid as long as the set and `kind`.
  DLTensor view(ResultKind& kind, std::size_t result) const {
    ResultShape& shape = kind.shapes.at(result);
    DLTensor view{};
    view.data = const_cast<std::byte*>(data.at(result));
    view.device = kind.device;
    view.dtype = kind.dtype;
    view.ndim = static_cast<int>(shape.dimensions);
    view.shape = shape.sizes.data();
    return view;
  }
};

// What makes tensors and looks at them.
struct TensorMakers {
  PyObject* new_empty = nullptr;                 // torch.Tensor.new_empty
  PyObject* split = nullptr;                     // torch.unsafe_split_with_sizes
  DLTensor (*view)(PyObject* tensor) = nullptr;  // of a plain tensor; Unusual for other objects
};

// Where a result lies that torch has made. A mode of torch may have made something else of it.
inline const std::byte* data_of(const TensorMakers& make, const ResultKind& kind,
                                std::size_t result, PyObject* tensor) {
  const DLTensor view = make.view(tensor);
  if (!kind.fits(view, result)) throw Unusual{};
  return clusterfusion::data_of(view);
}

// Puts an object into a tuple that nobody else has yet.
inline void put_into(const Owned& tuple, std::size_t index, Owned object) {
  if (PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(index), object.release()) != 0) {
    throw Unusual{};
  }
}

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
  ResultSet set;
  std::array<Owned, ResultKind::kMaxResults> results;
  for (std::size_t i = 0; i < kind.count; ++i) {
    results.at(i) = new_empty(make, like, kind.shapes.at(i));
    set.data.at(i) = data_of(make, kind, i, results.at(i).get());
  }
  set.tuple = own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)));
  for (std::size_t i = 0; i < kind.count; ++i) put_into(set.tuple, i, std::move(results.at(i)));
  return set;
}

// To be used, and kept until the process ends, under the GIL. While torch makes tensors, other
// threads may use it too. Nothing of it stays where a mode of torch made something else.
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

  // Whether each result begins as a tensor of its own would for all who load vectors, and is not so
  // large that its block would be a burden: such sizes are mistakes, which the library finds later.
  static bool can_be_cut(const ResultKind& kind) {
    constexpr std::int64_t kMostElements = 1 << 20;
    constexpr std::size_t kAlignment = 64;
    for (std::size_t i = 0; i < kind.count; ++i) {
      std::int64_t elements = 1;
      for (const std::int64_t size : kind.sizes(i)) {
        if (size < 1 || size > kMostElements / elements) return false;
        elements *= size;
      }
      if (kind.bytes(i) % kAlignment != 0) return false;
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
    std::array<Owned, ResultKind::kMaxResults> parts;
    std::array<const std::byte*, ResultKind::kMaxResults> begin{};
    for (std::size_t i = 0; i < kind.count; ++i) {
      parts.at(i) = make_parts(make, kind.shapes.at(i), like);
      begin.at(i) = data_of(make, kind, i, part(parts.at(i), 0).get());
      // A mode of torch treats all parts alike: with the last one, all lie where they should.
      const std::byte* last = data_of(make, kind, i, part(parts.at(i), kSets - 1).get());
      if (last != begin.at(i) + (kSets - 1) * kind.bytes(i)) throw Unusual{};
    }
    std::vector<ResultSet> sets(kSets);
    for (std::size_t n = 0; n < kSets; ++n) {
      sets[n].tuple = own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)));
      for (std::size_t i = 0; i < kind.count; ++i) {
        put_into(sets[n].tuple, i, part(parts.at(i), n));
        sets[n].data.at(i) = begin.at(i) + n * kind.bytes(i);
      }
    }
    return sets;
  }

  static Owned part(const Owned& parts, std::size_t n) {
    return own(PySequence_GetItem(parts.get(), static_cast<Py_ssize_t>(n)));
  }

  // A sequence of kSets tensors, parts of one.
  static Owned make_parts(const TensorMakers& make, ResultShape shape, PyObject* like) {
    const Owned rows = own(PyLong_FromLongLong(shape.sizes[0]));
    const Owned sizes = own(PyTuple_New(kSets));
    for (std::size_t i = 0; i < kSets; ++i) {
      put_into(sizes, i, share(rows.get()));
    }
    shape.sizes[0] *= static_cast<std::int64_t>(kSets);
    const Owned block = new_empty(make, like, shape);
    // What this makes are no views for autograd. torch.unsafe_split takes half as long again.
    return own(PyObject_CallFunctionObjArgs(make.split, block.get(), sizes.get(), nullptr));
  }

  std::vector<Shelf> shelves_;
};

}  // namespace clusterfusion::python
