// Results of the layer calls, whose memory torch makes for many at once.
//
// A tensor with memory of its own costs torch several times as much as a part of another one, so
// for each result of a kind of call a block for many is made, of which calls get one part after the
// other. Each result has its own version counter, but the memory of a block lives as long as any of
// its results.
#pragma once

#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/tensor_view.hpp"
#include "torch_api.hpp"

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

  // Of one result. Only for sizes of which there are blocks: those of others may not fit.
  std::int64_t elements(std::size_t result) const {
    std::int64_t elements = 1;
    for (const std::int64_t size : sizes(result)) elements *= size;
    return elements;
  }
  std::size_t bytes(std::size_t result) const {
    return static_cast<std::size_t>(elements(result)) * (dtype.bits / 8u * dtype.lanes);
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

// Where a result lies that torch has made. A mode of torch may have made something else of it.
inline const std::byte* data_of(const TorchApi& torch, const ResultKind& kind, std::size_t result,
                                PyObject* tensor) {
  const DLTensor view = torch.view(tensor);
  if (!kind.fits(view, result)) throw Unusual{};
  return clusterfusion::data_of(view);
}

// Results with memory of their own, of the dtype and on the device of `like`.
inline ResultSet new_results(const TorchApi& torch, const ResultKind& kind, PyObject* like) {
  ResultSet set;
  set.tuple = own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)));
  for (std::size_t i = 0; i < kind.count; ++i) {
    Owned result = torch.new_empty(like, kind.sizes(i));
    set.data.at(i) = data_of(torch, kind, i, result.get());
    put_into(set.tuple, i, std::move(result));
  }
  return set;
}

// To be used, and kept until the process ends, under the GIL. While torch makes tensors, other
// threads may use it too, and so may this one, from what Python's garbage collection calls. Nothing
// of it stays where a mode of torch made something else.
class ResultBlocks {
 public:
  // Results of this kind, of the dtype and on the device of `like`.
  ResultSet take(const TorchApi& torch, const ResultKind& kind, PyObject* like) {
    Shelf* shelf = find(kind);
    if (shelf == nullptr && !can_be_cut(kind)) return new_results(torch, kind, like);
    std::optional<Shelf> others;  // which go when all is in order
    if (shelf == nullptr || shelf->used == kParts || !is_where_it_was(torch, *shelf)) {
      others = make_blocks(torch, kind, like);
      shelf = &put(*others);
    }
    const std::int64_t index = shelf->used++;
    std::array<Owned, ResultKind::kMaxResults> blocks;
    for (std::size_t i = 0; i < kind.count; ++i) blocks.at(i) = share(shelf->blocks.at(i).get());
    ResultSet set;
    for (std::size_t i = 0; i < kind.count; ++i) {
      set.data.at(i) = shelf->begin.at(i) + static_cast<std::size_t>(index) * kind.bytes(i);
    }
    shelf = nullptr;  // it may move from here on
    set.tuple = own(PyTuple_New(static_cast<Py_ssize_t>(kind.count)));
    for (std::size_t i = 0; i < kind.count; ++i) {
      const std::int64_t first = index * kind.elements(i);
      put_into(set.tuple, i, torch.part(blocks.at(i).get(), kind.sizes(i), first));
    }
    return set;
  }

 private:
  static constexpr std::int64_t kParts = 32;

  struct Shelf {
    ResultKind kind{};
    std::array<Owned, ResultKind::kMaxResults> blocks;
    std::array<const std::byte*, ResultKind::kMaxResults> begin{};
    std::int64_t used = 0;  // parts that calls have got
  };

  Shelf* find(const ResultKind& kind) {
    const auto found = std::find_if(shelves_.begin(), shelves_.end(),
                                    [&](const Shelf& shelf) { return shelf.kind == kind; });
    return found == shelves_.end() ? nullptr : &*found;
  }

  // Whoever has a result may have resized its storage, which is the block's.
  static bool is_where_it_was(const TorchApi& torch, const Shelf& shelf) {
    for (std::size_t i = 0; i < shelf.kind.count; ++i) {
      if (torch.begin(shelf.blocks.at(i).get()) != shelf.begin.at(i)) return false;
    }
    return true;
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

  // Exchanges `shelf` for that of its kind, if there is one. The oldest one makes room.
  Shelf& put(Shelf& shelf) {
    constexpr std::size_t kMostShelves = 32;
    Shelf* place = find(shelf.kind);
    if (place == nullptr && shelves_.size() < kMostShelves) {
      place = &shelves_.emplace_back();
    } else if (place == nullptr) {
      std::rotate(shelves_.begin(), shelves_.begin() + 1, shelves_.end());
      place = &shelves_.back();
    }
    std::swap(*place, shelf);
    return *place;
  }

  static Shelf make_blocks(const TorchApi& torch, const ResultKind& kind, PyObject* like) {
    Shelf shelf;
    shelf.kind = kind;
    // A block's first dimension is that of a result, times as many.
    ResultKind whole = kind;
    for (std::size_t i = 0; i < kind.count; ++i) {
      whole.shapes.at(i).sizes.at(0) *= kParts;
      shelf.blocks.at(i) = torch.new_empty(like, whole.sizes(i));
      shelf.begin.at(i) = data_of(torch, whole, i, shelf.blocks.at(i).get());
    }
    return shelf;
  }

  std::vector<Shelf> shelves_;
};

}  // namespace clusterfusion::python
