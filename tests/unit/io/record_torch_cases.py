"""Records files that torch.save wrote, and what torch reads from them.

Writes data/torch/* for torch_file_test.cpp. Needs torch.
Usage: python tests/unit/io/record_torch_cases.py [--version]

With --version it only adds a file of the torch in use, whose name tells its version: run that with
an older torch first.
"""

import json
import pathlib
import sys
import warnings
from collections import OrderedDict
from typing import Any

import torch

FOLDER = pathlib.Path(__file__).parent / "data" / "torch"
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def numbered(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of different values."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 100).to(dtype).reshape(shape)


def state_dict(**tensors: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
    """As torch.nn.Module.state_dict() gives it, with its attribute."""
    result = OrderedDict(tensors)
    result._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return result


def readable_cases() -> dict[str, Any]:
    """State dicts that must be read."""
    whole = numbered(torch.float32, 40)
    matrix = numbered(torch.float16, 3, 4)
    return {
        "dtypes": {tag: numbered(dtype, 2, 3) for tag, dtype in DTYPES.items()},
        "state_dict": state_dict(weight=matrix, bias=numbered(torch.float16, 3)),
        "module": torch.nn.Linear(3, 2).state_dict(),
        "parameters": {"weight": torch.nn.Parameter(matrix.clone())},
        "tied": state_dict(embed=matrix, head=matrix),
        "views": {"rest": whole[7:], "part": whole[10:22].view(3, 4), "all": whole},
        "strided": {
            "transposed": matrix.t(),
            "narrow": matrix[:, 1:3],
            "expanded": whole[:1].expand(5),
            "permuted_ones": numbered(torch.float32, 1, 4, 1).permute(2, 0, 1),
        },
        "scalars": {"masked_bias": torch.tensor(-1e9), "empty": torch.empty(0, 5)},
        "buffers": {
            "attention.bias": torch.tril(torch.ones(4, 4, dtype=torch.uint8))[None, None],
            "attention.mask": torch.tril(torch.ones(4, 4, dtype=torch.bool))[None, None],
        },
        "no_tensor": state_dict(),
    }


def attributed() -> torch.nn.Parameter:
    """A parameter that carries an attribute."""
    parameter = torch.nn.Parameter(numbered(torch.float32, 2))
    parameter.extra = "state"  # type: ignore[attr-defined]
    return parameter


def refused_cases() -> dict[str, tuple[Any, dict[str, Any], str]]:
    """What is saved, options of torch.save, and a word of the refusal."""
    plain = {"a": numbered(torch.float32, 2)}
    return {
        "legacy": (plain, {"_use_new_zipfile_serialization": False}, "before version 1.6"),
        "protocol_4": (plain, {"pickle_protocol": 4}, "protocol 4"),
        "whole_module": (torch.nn.Linear(2, 2), {}, "torch.nn.modules.linear.Linear"),
        "training": ({"model": plain, "step": 7}, {}, "training checkpoint"),
        "only_tensor": (plain["a"], {}, "state dict"),
        "only_list": ([plain["a"]], {}, "state dict"),
        "integer_keys": ({1: plain["a"]}, {}, "names of tensors"),
        "float8": ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, {}, "_rebuild_tensor_v3"),
        "sparse": ({"a": torch.eye(2).to_sparse()}, {}, "_rebuild_sparse_tensor"),
        "quantized": (
            {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
            {},
            "_rebuild_qtensor",
        ),
        "complex": ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, "ComplexFloatStorage"),
        "device": ({"a": torch.device("cpu")}, {}, "torch.device"),
    }


def write_version() -> None:
    """A state dict as older versions of transformers had it."""
    tensors = torch.nn.Linear(3, 2).half().state_dict()
    mask = torch.tril(torch.ones(4, 4, dtype=torch.uint8)).view(1, 1, 4, 4)
    tensors["attention.bias"] = mask
    tensors["attention.masked_bias"] = torch.tensor(-1e9)
    torch.save(tensors, FOLDER / f"version_{torch.__version__.split('+')[0]}.bin")


def tensor_record(tensor: torch.Tensor) -> dict[str, Any]:
    """What must be read of a tensor."""
    tag = next(tag for tag, dtype in DTYPES.items() if dtype == tensor.dtype)
    contiguous = tensor.is_contiguous()
    record = {"dtype": tag, "shape": list(tensor.shape)}
    if contiguous:
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        record["bytes"] = data.numpy().tobytes().hex()
    else:
        record["strides"] = list(tensor.stride())
    return record


def main() -> None:
    """Writes everything."""
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:] == ["--version"]:
        return write_version()
    read: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("version_*.bin")):
        loaded = torch.load(path, weights_only=True)
        read[path.stem] = {key: tensor_record(tensor) for key, tensor in loaded.items()}
    for name, tensors in readable_cases().items():
        torch.save(tensors, FOLDER / f"{name}.bin")
        loaded = torch.load(FOLDER / f"{name}.bin", weights_only=True)
        read[name] = {key: tensor_record(tensor) for key, tensor in loaded.items()}
    torch.save({"a": attributed()}, FOLDER / "parameter_with_state.bin")
    read["parameter_with_state"] = {"a": tensor_record(attributed())}
    refused = {}
    for name, (value, options, word) in refused_cases().items():
        torch.save(value, FOLDER / f"{name}.bin", **options)
        refused[name] = word
    assert {path.stem for path in FOLDER.glob("*.bin")} == {*read, *refused}
    cases = {"torch": torch.__version__, "read": read, "refused": refused}
    (FOLDER / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
