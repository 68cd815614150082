"""The tokenizer of this project, by whatever way it can be reached."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

TOOL = Path("tests/unit/tokenizer/tokenizer_tool")


def _pack(lists: list[bytes], width: int) -> bytes:
    return b"".join(struct.pack("<I", len(item) // width) + item for item in lists)


def _unpack(data: bytes, width: int) -> list[bytes]:
    lists, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        begin = position + 4
        position = begin + length * width
        lists.append(data[begin:position])
    return lists


class ToolTokenizer:
    """Tokenizer of the C++ library, through the program that the C++ tests build."""

    def __init__(self, path: Path, tool: Path):
        self.path, self.tool = path, tool

    def _run(self, mode: str, data: bytes) -> bytes:
        command = [str(self.tool), str(self.path), mode]
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    def encode_batch(
        self, texts: list[bytes], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        output = self._run("encode" if add_special_tokens else "tokens", _pack(texts, 1))
        return [list(memoryview(ids).cast("i")) for ids in _unpack(output, 4)]

    def decode_batch(
        self, lists: list[list[int]], *, skip_special_tokens: bool = True
    ) -> list[str]:
        packed = _pack([struct.pack(f"<{len(ids)}i", *ids) for ids in lists], 4)
        output = self._run("decode" if skip_special_tokens else "all", packed)
        return [text.decode() for text in _unpack(output, 1)]


class PackageTokenizer:
    """Tokenizer of the Python package."""

    def __init__(self, path: Path):
        import clusterfusion

        self.tokenizer = clusterfusion.Tokenizer(path)

    def encode_batch(
        self, texts: list[bytes], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def decode_batch(
        self, lists: list[list[int]], *, skip_special_tokens: bool = True
    ) -> list[str]:
        decode = self.tokenizer.decode
        return [decode(ids, skip_special_tokens=skip_special_tokens) for ids in lists]


def open_tokenizer(path: Path) -> ToolTokenizer | PackageTokenizer:
    """Opens tokenizer.json, with the build's program if one is named, else with the package."""
    folder = os.environ.get("CLUSTERFUSION_BUILD_DIR")
    if folder and (Path(folder) / TOOL).is_file():
        return ToolTokenizer(path, Path(folder) / TOOL)
    try:
        return PackageTokenizer(path)
    except ImportError as error:
        pytest.skip(f"no {TOOL} in CLUSTERFUSION_BUILD_DIR={folder}, and no package: {error}")
