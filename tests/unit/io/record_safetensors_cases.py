"""Records which files the reference implementation of safetensors accepts, and what it reads.

Writes data/safetensors_cases.json for safetensors_test.cpp. Needs the `safetensors` package.
Usage: python tests/unit/io/record_safetensors_cases.py
"""

import json
import pathlib
import random
import struct
from typing import Any

import safetensors

BITS = {"BOOL": 8, "U8": 8, "F8_E4M3": 8, "I16": 16, "F16": 16, "BF16": 16, "F32": 32, "I64": 64}
RANDOM_CASES = 150


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F16") -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def framed(header: bytes | dict[str, Any] | list[Any], data_bytes: int = 0) -> bytes:
    """A file: the header's length, the header, and numbered bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(i % 251 for i in range(data_bytes))


ONE = {"a": tensor([2], 0, 4)}


def header_cases() -> dict[str, bytes]:
    """Files that each make one point about the header as such."""
    text = json.dumps(ONE).encode()
    return {
        "no bytes": b"",
        "seven bytes": b"\0" * 7,
        "a length of zero": b"\0" * 8,
        "a length beyond the limit": struct.pack("<Q", 100_000_001) + b"{}",
        "the largest length": b"\xff" * 8 + b"{}",
        "a header cut short": framed(ONE, 4)[:40],
        "one tensor": framed(ONE, 4),
        "metadata": framed({"__metadata__": {"format": "pt"}, **ONE}, 4),
        "null metadata": framed({"__metadata__": None, **ONE}, 4),
        "metadata that is no text": framed({"__metadata__": {"format": 1}, **ONE}, 4),
        "metadata that is a list": framed({"__metadata__": ["pt"], **ONE}, 4),
        "no tensor": framed({}),
        "no tensor but data": framed({}, 1),
        "white space before": framed(b" " + text, 4),
        "white space after": framed(text + b"   ", 4),
        "a zero byte after": framed(text + b"\0", 4),
        "a list": framed([1]),
        "a byte order mark": framed(b"\xef\xbb\xbf" + text, 4),
        "broken UTF-8": framed(b'{"\xff": 1}'),
        "cut JSON": framed(text[:-1], 4),
    }


def tensor_cases() -> dict[str, bytes]:
    """Files that each make one point about the tensors."""
    return {
        "an unknown field": framed({"a": {**ONE["a"], "extra": 1}}, 4),
        "no dtype": framed({"a": {"shape": [2], "data_offsets": [0, 4]}}, 4),
        "no shape": framed({"a": {"dtype": "F16", "data_offsets": [0, 4]}}, 4),
        "no offsets": framed({"a": {"dtype": "F16", "shape": [2]}}, 4),
        "three offsets": framed({"a": {**ONE["a"], "data_offsets": [0, 4, 4]}}, 4),
        "a scalar": framed({"a": tensor([], 0, 2)}, 2),
        "an unknown dtype": framed({"a": tensor([2], 0, 4, "F17")}, 4),
        "two four-bit values": framed({"a": tensor([2], 0, 1, "F4")}, 1),
        "one four-bit value": framed({"a": tensor([1], 0, 1, "F4")}, 1),
        "a negative extent": framed({"a": tensor([-2], 0, 4)}, 4),
        "a fractional extent": framed({"a": tensor([2.0], 0, 4)}, 4),
        "an overflowing shape": framed({"a": tensor([2**40, 2**40], 0, 4)}, 4),
        "an overflowing shape without elements": framed({"a": tensor([2**40, 2**40, 0], 0, 0)}),
        "a hole in front": framed({"a": tensor([2], 2, 6)}, 6),
        "a hole between": framed({"a": tensor([2], 0, 4), "b": tensor([2], 6, 10)}, 10),
        "an overlap": framed({"a": tensor([2], 0, 4), "b": tensor([2], 2, 6)}, 6),
        "the same bytes twice": framed({"a": tensor([2], 0, 4), "b": tensor([2], 0, 4)}, 4),
        "tensors out of order": framed({"b": tensor([2], 4, 8), "a": tensor([2], 0, 4)}, 8),
        "offsets the wrong way": framed({"a": tensor([2], 4, 0)}, 4),
        "fewer bytes than the shape": framed({"a": tensor([3], 0, 4)}, 4),
        "a byte too many": framed(ONE, 5),
        "a byte too few": framed(ONE, 3),
        "no data": framed(ONE),
        "empty tensors": framed(
            {"a": tensor([0], 0, 0), "b": tensor([2], 0, 4), "c": tensor([0, 5], 4, 4)}, 4
        ),
        "an empty tensor inside another": framed(
            {"a": tensor([0], 2, 2), "b": tensor([2], 0, 4)}, 4
        ),
        "a misaligned tensor": framed({"a": tensor([1], 0, 1, "U8"), "b": tensor([1], 1, 3)}, 3),
        "every dtype": framed(
            {
                d: tensor([1], 8 * i, 8 * i + 8, d)
                for i, d in enumerate(["I64", "U64", "F64", "C64"])
            },
            32,
        ),
    }


def random_case(rng: random.Random) -> bytes:
    """A file with a few tensors, and in three cases of four something wrong with it."""
    header: dict[str, Any] = {}
    offset = 0
    for name in rng.sample("abcdefgh", rng.randint(1, 5)):
        dtype = rng.choice(list(BITS))
        shape = [rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randint(0, 3))]
        count = 1
        for extent in shape:
            count *= extent
        size = count * BITS[dtype] // 8
        header[name] = tensor(shape, offset, offset + size, dtype)
        offset += size
    if rng.random() < 0.75:
        entry = header[rng.choice(list(header))]
        what = rng.choice(["begin", "end", "both", "dtype", "extent", "length"])
        step = rng.choice([-4, -2, -1, 1, 2, 4])
        if what in ("begin", "both"):
            entry["data_offsets"][0] += step
        if what in ("end", "both"):
            entry["data_offsets"][1] += step
        if what == "dtype":
            entry["dtype"] = rng.choice(list(BITS))
        if what == "extent" and entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] += step
        if what == "length":
            offset = max(0, offset + step)
    items = list(header.items())
    rng.shuffle(items)
    return framed(dict(items), offset)


def record(name: str, file: bytes) -> dict[str, Any]:
    """What the reference makes of a file."""
    case: dict[str, Any] = {"name": name, "file": file.hex()}
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError as error:
        return {**case, "error": str(error)}
    return {
        **case,
        "tensors": {
            key: {"dtype": t["dtype"], "shape": t["shape"], "data": bytes(t["data"]).hex()}
            for key, t in sorted(tensors)
        },
    }


def main() -> None:
    """Writes the file."""
    rng = random.Random(7)
    cases = header_cases() | tensor_cases()
    cases.update({f"random {i}": random_case(rng) for i in range(RANDOM_CASES)})
    lines = [json.dumps(record(name, file)) for name, file in cases.items()]
    path = pathlib.Path(__file__).parent / "data" / "safetensors_cases.json"
    version = json.dumps(safetensors.__version__)
    path.write_text(f'{{"safetensors": {version}, "cases": [\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main()
