// Files of tensors as torch.save has written them since PyTorch 1.6 (pytorch_model.bin): a zip
// archive of one folder, with
//
//   FOLDER/data.pkl    a pickle of the state dict, whose storages are named by persistent ids
//   FOLDER/data/KEY    a storage's bytes, at a multiple of 64 from the file's start
//   FOLDER/version     of the format; FOLDER/byteorder (since 2.1): "little" or "big"
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "io/tensor_entry.hpp"

namespace clusterfusion {

// Reads the state dict of a whole file's bytes and checks every tensor against its storage; touches
// no storage and executes nothing. Tensors may share storages. The pickle may name only what
// tensors of torch's plain dtypes need (OrderedDict, the functions that rebuild tensors and
// parameters, the storages). `file` stands for the bytes in messages. The tensors come in the order
// of the state dict.
// Errors: malformed; unsupported for whatever else torch.save can write, older formats among it.
std::vector<TensorEntry> parse_torch_file(std::span<const std::byte> bytes,
                                          const std::string& file);

}  // namespace clusterfusion
