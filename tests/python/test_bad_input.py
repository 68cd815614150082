"""Broken checkpoints and impossible requests: one clear message each, never a crash.

Each defect says which exception must come, and which words its message must hold: the file, tensor
or option, what was expected, what was found. With the program's path in CLUSTERFUSION_BIN the same
defects go through the command line as well.
"""

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import train_tokenizer, write_random_checkpoint

SETTING = {"hidden_size": 32, "num_heads": 2, "vocab_size": 300, "max_positions": 40}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"  # [96, 32]
DENSE = "gpt_neox.layers.1.attention.dense.weight"  # [32, 32]
UP = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"  # [128, 32]
NORM = "gpt_neox.final_layer_norm.weight"  # [32]
CLEAN_ERRORS = (
    ValueError,
    NotImplementedError,
    FileNotFoundError,
    ArithmeticError,
    MemoryError,
    IndexError,
)
PROGRAM = os.environ.get("CLUSTERFUSION_BIN")


# How checkpoints are broken.


def read_parts(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def write_parts(path: Path, header: dict | bytes, data: bytes, alignment: int = 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % alignment)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, data = read_parts(path)
        change(header)
        write_parts(path, header, data)

    return damage


def edit_tensor(name: str, **fields: object) -> Callable[[Path], None]:
    return edit_header(lambda header: header[name].update(fields))


def edit_json(file: str, **fields: object) -> Callable[[Path], None]:
    """Sets keys of a JSON file; ... removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | fields
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / file).write_text(json.dumps(content))

    return damage


def edit_config(**fields: object) -> Callable[[Path], None]:
    return edit_json("config.json", **fields)


def write_file(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def truncate(size: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Cuts the weights to size(header's end, file's end) bytes."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: size(8 + int.from_bytes(data[:8], "little"), len(data))])

    return damage


def append_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def claim_header_length(length: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return damage


def overlap(header: dict) -> None:
    """Lets a tensor begin in the last two bytes of the one before."""
    header[DENSE]["data_offsets"] = [offset - 2 for offset in header[DENSE]["data_offsets"]]


def swap_offsets(header: dict) -> None:
    header[UP]["data_offsets"].reverse()


def shift_last(header: dict) -> None:
    """Leaves two bytes between the last tensor and the one before."""
    header["embed_out.weight"]["data_offsets"] = [
        offset + 2 for offset in header["embed_out.weight"]["data_offsets"]
    ]


def repeat_key(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = read_parts(path)
    text = json.dumps(header)
    write_parts(path, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)


def drop_last_tensor(name: str | None) -> Callable[[Path], None]:
    """Removes the last tensor, or renames it."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, data = read_parts(path)
        last = header.pop("embed_out.weight")
        if name is None:
            data = data[: last["data_offsets"][0]]
        else:
            header[name] = last
        write_parts(path, header, data)

    return damage


def add_tensor(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, data = read_parts(path)
        header[name] = {
            "dtype": "F16",
            "shape": [300, 32],
            "data_offsets": [len(data), len(data) + 19200],
        }
        write_parts(path, header, data + bytes(19200))

    return damage


def edit_weight_map(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def move_out(target: str) -> Callable[[Path], None]:
    """Lets the index name a shard that lies elsewhere; the file exists and is a good one."""

    def damage(folder: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        place = (folder / target.format(folder=folder.parent)).resolve()
        place.parent.mkdir(exist_ok=True)
        shutil.move(shard, place)
        written = target.format(folder=folder.parent)
        edit_weight_map(
            lambda names: names.update({k: written for k, v in names.items() if v == shard.name})
        )(folder)

    return damage


def repeat_in_other_shard(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    header, data = read_parts(second)
    name, entry = next(item for item in read_parts(first)[0].items() if item[0] != "__metadata__")
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    header[name] = entry | {"data_offsets": [len(data), len(data) + size]}
    write_parts(second, header, data + bytes(size))


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def only_torch_file(content: bytes | None) -> Callable[[Path], None]:
    """No safetensors, but pytorch_model.bin with these bytes; None: those of the safetensors."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        if content is not None:
            (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def torch_archive(pickle: bytes) -> bytes:
    """A file of torch's with this pickle and no storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


# What torch.save wrote before version 1.6 begins with two pickles: a magic number and a version.
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
# Runs a command as soon as Python's own pickle module reads it.
EVIL_PICKLE = b"\x80\x02cposix\nsystem\nX\x0e\x00\x00\x00touch /tmp/evil\x85R."


def replace_by_folder(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def dangle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone.safetensors")


def make_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def remove(*files: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


@dataclass(frozen=True)
class Defect:
    """A way to break a checkpoint, the exception that must come and words of its message."""

    name: str
    damage: Callable[[Path], None]
    error: type[Exception]
    words: tuple[str, ...]
    shards: int = 1


WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
TORCH_FILE = "pytorch_model.bin"

DEFECTS = [
    # Cut off, at every border that means something.
    Defect("no bytes", truncate(lambda h, n: 0), ValueError, (WEIGHTS, "empty")),
    Defect("half a length", truncate(lambda h, n: 7), ValueError, (WEIGHTS, "found 7", "8")),
    Defect("only a length", truncate(lambda h, n: 8), ValueError, (WEIGHTS, "truncated", "0")),
    Defect("half a header", truncate(lambda h, n: h // 2), ValueError, (WEIGHTS, "truncated")),
    Defect("a byte less header", truncate(lambda h, n: h - 1), ValueError, (WEIGHTS, "truncated")),
    Defect("only a header", truncate(lambda h, n: h), ValueError, (WEIGHTS, "truncated", "only 0")),
    Defect("half the data", truncate(lambda h, n: (h + n) // 2), ValueError, (WEIGHTS, "truncat")),
    Defect("a byte less", truncate(lambda h, n: n - 1), ValueError, (WEIGHTS, "embed_out.weight")),
    Defect("a byte more", append_byte, ValueError, (WEIGHTS, "oversized")),
    # A header that lies.
    Defect("huge header", claim_header_length(2**63), ValueError, (WEIGHTS, str(2**63), "header")),
    Defect("long header", claim_header_length(99_999_999), ValueError, (WEIGHTS, "99999999")),
    Defect("short header", claim_header_length(100), ValueError, (WEIGHTS, "JSON")),
    Defect("no header", claim_header_length(0), ValueError, (WEIGHTS, "JSON")),
    Defect("overlap", edit_header(overlap), ValueError, (WEIGHTS, "overlap", DENSE)),
    Defect("hole", edit_header(shift_last), ValueError, (WEIGHTS, "embed_out.weight")),
    Defect(
        "reversed offsets", edit_header(swap_offsets), ValueError, (WEIGHTS, UP, "begin <= end")
    ),
    Defect("key twice", repeat_key, ValueError, (WEIGHTS, NORM, "twice")),
    Defect("one offset", edit_tensor(UP, data_offsets=[0]), ValueError, (WEIGHTS, UP, "[0]")),
    Defect(
        "negative offset", edit_tensor(UP, data_offsets=[-8, 8184]), ValueError, (WEIGHTS, UP, "-8")
    ),
    Defect(
        "negative extent", edit_tensor(UP, shape=[-128, -32]), ValueError, (WEIGHTS, UP, "-128")
    ),
    Defect(
        "fractional extent", edit_tensor(UP, shape=[128.5, 32]), ValueError, (WEIGHTS, UP, "128.5")
    ),
    Defect("overflow", edit_tensor(UP, shape=[2**62, 2**62]), ValueError, (WEIGHTS, UP, "64 bits")),
    Defect(
        "no shape", edit_header(lambda h: h[UP].pop("shape")), ValueError, (WEIGHTS, UP, "shape")
    ),
    Defect(
        "no dtype", edit_header(lambda h: h[UP].pop("dtype")), ValueError, (WEIGHTS, UP, "dtype")
    ),
    Defect(
        "metadata of numbers",
        edit_header(lambda h: h["__metadata__"].update(format=3)),
        ValueError,
        (WEIGHTS, "__metadata__", "3"),
    ),
    Defect(
        "bytes unlike the shape",
        edit_tensor(UP, shape=[127, 32]),
        ValueError,
        (WEIGHTS, UP, "[127, 32]", "8128", "8192"),
    ),
    # A type or shape that the model cannot have.
    Defect("unknown dtype", edit_tensor(UP, dtype="Q4"), NotImplementedError, (WEIGHTS, UP, "Q4")),
    Defect(
        "integers", edit_tensor(UP, dtype="I16"), NotImplementedError, (WEIGHTS, UP, "I16", "F16")
    ),
    Defect(
        "transposed", edit_tensor(UP, shape=[32, 128]), ValueError, (UP, "[32, 128]", "[128, 32]")
    ),
    Defect("flat", edit_tensor(DENSE, shape=[1024]), ValueError, (DENSE, "[1024]", "[32, 32]")),
    Defect("deep", edit_tensor(DENSE, shape=[1, 32, 32]), ValueError, (DENSE, "[1, 32, 32]")),
    # Too few or too many tensors.
    Defect("no head", drop_last_tensor(None), ValueError, ("embed_out.weight", "missing")),
    Defect("renamed", drop_last_tensor("embed_aus.weight"), ValueError, ("embed_aus.weight",)),
    Defect("extra tensor", add_tensor("extra.weight"), ValueError, ("extra.weight", "no place")),
    Defect("two heads", add_tensor("lm_head.weight"), ValueError, ("lm_head.weight", "embed_out")),
    Defect("a layer more", edit_config(num_hidden_layers=3), ValueError, ("layers.2.", "missing")),
    Defect("a layer less", edit_config(num_hidden_layers=1), ValueError, ("layers.1.", "no place")),
    Defect("lying vocabulary", edit_config(vocab_size=301), ValueError, ("[300, 32]", "[301, 32]")),
    Defect("lying width", edit_config(hidden_size=64), ValueError, ("[300, 32]", "[300, 64]")),
    Defect("lying mlp", edit_config(intermediate_size=5), ValueError, ("[128, 32]", "[5, 32]")),
    Defect(
        "no biases, it says",
        edit_config(attention_bias=False),
        ValueError,
        ("query_key_value.bias", "no place"),
    ),
    # The index of shards.
    Defect(
        "shard above", move_out("../" + SHARD), ValueError, (INDEX, "../" + SHARD, "same folder"), 2
    ),
    Defect(
        "absolute shard",
        move_out("{folder}/" + SHARD),
        ValueError,
        (INDEX, SHARD, "same folder"),
        2,
    ),
    Defect("shard below", move_out("a/" + SHARD), ValueError, (INDEX, "a/" + SHARD), 2),
    Defect("shard missing", remove(SHARD), FileNotFoundError, (INDEX, SHARD), 2),
    Defect("shards swapped", swap_shards, ValueError, (INDEX, SHARD, "but it is in"), 2),
    Defect("tensor in two shards", repeat_in_other_shard, ValueError, ("two shards", SHARD), 2),
    Defect(
        "promised in vain",
        edit_weight_map(lambda names: names.update({"more.weight": SHARD})),
        ValueError,
        (INDEX, "more.weight"),
        2,
    ),
    Defect(
        "not promised",
        edit_weight_map(lambda names: names.pop(NORM)),
        ValueError,
        (INDEX, NORM),
        2,
    ),
    Defect("empty map", edit_json(INDEX, weight_map={}), ValueError, (INDEX, "empty"), 2),
    Defect("map is a list", edit_json(INDEX, weight_map=[1]), ValueError, (INDEX, "weight_map"), 2),
    Defect("no map", edit_json(INDEX, weight_map=...), ValueError, (INDEX, "weight_map"), 2),
    Defect(
        "map to a number",
        edit_weight_map(lambda names: names.update({NORM: 5})),
        ValueError,
        (INDEX, NORM, "5"),
        2,
    ),
    Defect(
        "broken index", write_file(INDEX, b'{"weight_map": {'), ValueError, (INDEX, "line 1"), 2
    ),
    # The configuration.
    Defect("no config", remove(CONFIG), FileNotFoundError, (CONFIG,)),
    Defect("empty config", write_file(CONFIG, b""), ValueError, (CONFIG,)),
    Defect(
        "config cut off",
        write_file(CONFIG, b'{"model_type":\n "gp'),
        ValueError,
        (CONFIG, "line 2"),
    ),
    Defect("config no object", write_file(CONFIG, b"[1, 2]"), ValueError, (CONFIG, "object")),
    Defect("config no UTF-8", write_file(CONFIG, b'{"model_type": "\xff"}'), ValueError, (CONFIG,)),
    Defect("config binary", write_file(CONFIG, bytes(range(256))), ValueError, (CONFIG,)),
    Defect("config deep", write_file(CONFIG, b"[" * 100_000), ValueError, (CONFIG,)),
    Defect(
        "another architecture",
        edit_config(model_type="mixtral"),
        NotImplementedError,
        (CONFIG, "model_type", "mixtral", "gpt_neox"),
    ),
    Defect(
        "another class",
        edit_config(architectures=["LlamaForCausalLM"]),
        NotImplementedError,
        (CONFIG, "LlamaForCausalLM", "GPTNeoXForCausalLM"),
    ),
    Defect("no size", edit_config(hidden_size=...), ValueError, (CONFIG, "hidden_size")),
    Defect(
        "text as size", edit_config(hidden_size="32"), ValueError, (CONFIG, "hidden_size", '"32"')
    ),
    Defect(
        "no layers", edit_config(num_hidden_layers=0), ValueError, (CONFIG, "num_hidden_layers")
    ),
    Defect(
        "negative size", edit_config(vocab_size=-300), ValueError, (CONFIG, "vocab_size", "-300")
    ),
    Defect("endless size", edit_config(hidden_size=2**62), ValueError, (CONFIG, "hidden_size")),
    Defect(
        "heads do not divide", edit_config(num_attention_heads=5), ValueError, (CONFIG, "5", "32")
    ),
    Defect(
        "no heads", edit_config(num_attention_heads=0), ValueError, (CONFIG, "num_attention_heads")
    ),
    Defect("no positions", edit_config(max_position_embeddings=0), ValueError, (CONFIG, "positi")),
    Defect(
        "rotary above 1", edit_config(rotary_pct=1.5), ValueError, (CONFIG, "rotary_pct", "1.5")
    ),
    Defect("odd rotary", edit_config(rotary_pct=0.2), NotImplementedError, (CONFIG, "0.2", "even")),
    Defect("base 0", edit_config(rotary_emb_base=0), ValueError, (CONFIG, "rotary_emb_base", "0")),
    Defect("epsilon", edit_config(layer_norm_eps=-1e-5), ValueError, (CONFIG, "layer_norm_eps")),
    Defect(
        "activation",
        edit_config(hidden_act="xielu"),
        NotImplementedError,
        (CONFIG, "xielu", "gelu"),
    ),
    Defect("activation number", edit_config(hidden_act=3), ValueError, (CONFIG, "hidden_act", "3")),
    Defect("residual text", edit_config(use_parallel_residual="no"), ValueError, (CONFIG, '"no"')),
    Defect("end token outside", edit_config(eos_token_id=300), ValueError, (CONFIG, "eos", "300")),
    Defect(
        "quantized",
        edit_config(quantization_config={"quant_method": "gptq"}),
        NotImplementedError,
        (CONFIG, "quantization_config"),
    ),
    *(
        Defect(
            f"rope {kind} {key}",
            edit_config(**{key: {spelling: kind, "factor": 2.0}}),
            NotImplementedError,
            (CONFIG, kind, "default"),
        )
        for kind in ("linear", "dynamic", "yarn", "longrope", "llama3")
        for key, spelling in (("rope_scaling", "type"), ("rope_parameters", "rope_type"))
    ),
    # The tokenizer.
    Defect(
        "tokenizer broken",
        write_file("tokenizer.json", b'{"model"'),
        ValueError,
        ("tokenizer.json",),
    ),
    Defect(
        "tokenizer of another kind",
        write_file("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}'),
        NotImplementedError,
        ("tokenizer.json", "WordPiece", "BPE"),
    ),
    # Files and folders.
    Defect("no weights", remove(WEIGHTS), FileNotFoundError, (WEIGHTS, INDEX)),
    Defect("empty folder", remove(WEIGHTS, CONFIG), FileNotFoundError, (CONFIG,)),
    # torch's files.
    Defect("no zip file", only_torch_file(None), ValueError, (TORCH_FILE, "zip")),
    Defect("empty torch file", only_torch_file(b""), ValueError, (TORCH_FILE, "empty")),
    Defect(
        "old torch file",
        only_torch_file(OLD_TORCH),
        NotImplementedError,
        (TORCH_FILE, "1.6", "torch.load", "weights_only=True", "torch.save"),
    ),
    Defect(
        "program in a pickle",
        only_torch_file(torch_archive(EVIL_PICKLE)),
        NotImplementedError,
        (TORCH_FILE, "posix.system", "executed"),
    ),
    Defect(
        "unknown instruction",
        only_torch_file(torch_archive(b"\x80\x02I7\n.")),
        NotImplementedError,
        (TORCH_FILE, "INT"),
    ),
    Defect(
        "no state dict",
        only_torch_file(torch_archive(b"\x80\x02N.")),
        NotImplementedError,
        (TORCH_FILE, "state dict", "None"),
    ),
    Defect("weights are a folder", replace_by_folder(WEIGHTS), OSError, (WEIGHTS, "folder")),
    Defect("config is a folder", replace_by_folder(CONFIG), OSError, (CONFIG, "folder")),
    Defect("config is a pipe", make_pipe, OSError, (CONFIG, "pipe")),
    Defect("dangling link", dangle, FileNotFoundError, (WEIGHTS,)),
]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", **SETTING)


@pytest.fixture(params=DEFECTS, ids=lambda defect: defect.name)
def defect(request) -> Defect:
    return request.param


@pytest.fixture
def broken(defect, tmp_path) -> Path:
    folder = write_random_checkpoint(tmp_path / "checkpoint", shards=defect.shards, **SETTING)
    defect.damage(folder)
    return folder


def test_broken_checkpoint(defect, broken):
    with pytest.raises(defect.error) as caught:
        clusterfusion.Engine(broken, device="cpu")
    assert caught.type is defect.error
    message = str(caught.value)
    assert [word for word in defect.words if word not in message] == [], message


needs_program = pytest.mark.skipif(PROGRAM is None, reason="CLUSTERFUSION_BIN is not set")


@needs_program
def test_broken_checkpoint_on_the_command_line(defect, broken):
    ended = subprocess.run([PROGRAM, "info", broken], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stdout == ""
    missing = [word for word in defect.words if word not in ended.stderr]
    assert missing == [], ended.stderr


@needs_program
def test_full_disk(checkpoint):
    train_tokenizer(checkpoint, 300)
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [PROGRAM, "generate", checkpoint, "-p", "It was", "-n", "4"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr


def test_intact_checkpoints_open(checkpoint, tmp_path):
    """What the defects break is whole before."""
    assert np.isfinite(clusterfusion.Engine(checkpoint, device="cpu").logits([1, 2])).all()
    shards = write_random_checkpoint(tmp_path / "shards", shards=2, **SETTING)
    assert np.isfinite(clusterfusion.Engine(shards, device="cpu").logits([1, 2])).all()


def test_file_instead_of_folder(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"config\.json.*folder"):
        clusterfusion.Engine(checkpoint / "config.json")


def test_no_such_folder(checkpoint):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        clusterfusion.Engine(checkpoint / "nowhere")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_no_permission(checkpoint, file):
    """As root every file may be read, so that the check runs as a user who is nobody."""
    (checkpoint / file).chmod(0)
    script = f"""
        import os
        import clusterfusion
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            clusterfusion.Engine({str(checkpoint)!r})
        except PermissionError as error:
            assert {file!r} in str(error), error
            print("refused")
    """
    for folder in checkpoint.parents:  # nobody must be able to walk to the checkpoint
        if folder.owner() == checkpoint.owner() and folder.stat().st_mode & 0o111 != 0o111:
            folder.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "refused\n", ended.stderr


# Weights that are no numbers.


def fill(folder: Path, name: str, index: int, value: float) -> None:
    """Sets one element of a float16 tensor."""
    path = folder / WEIGHTS
    header, data = read_parts(path)
    values = np.frombuffer(data, np.uint8).copy()
    begin = header[name]["data_offsets"][0] + 2 * index
    values[begin : begin + 2] = np.array([value], np.float16).view(np.uint8)
    write_parts(path, header, values.tobytes())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index", "place"),
    [
        ("gpt_neox.embed_in.weight", 3 * 32 + 7, "3, 7"),
        ("gpt_neox.layers.0.input_layernorm.bias", 31, "31"),
        (QKV, 70 * 32, "70, 0"),  # a value of the first head: keys could hide in the softmax
        (DENSE, 5, "0, 5"),
        (UP, 127 * 32 + 31, "127, 31"),
        (NORM, 0, "0"),
        ("embed_out.weight", 299 * 32 + 31, "299, 31"),
    ],
)
def test_non_finite_weight_is_named(checkpoint, name, index, place, value):
    fill(checkpoint, name, index, value)
    engine = clusterfusion.Engine(checkpoint, device="cpu")
    for call in (
        lambda: engine.logits([3, 4, 3]),
        lambda: engine.score([3, 4, 3]),
        lambda: engine.perplexity([3, 4, 3, 5]),
        lambda: engine.generate([3, 4, 3], max_new_tokens=3),
        lambda: engine.generate([[1], [3, 4, 3]], max_new_tokens=3, temperature=1.0),
    ):
        with pytest.raises(ArithmeticError) as caught:
            call()
        assert name in str(caught.value)
        assert f"[{place}]" in str(caught.value)


def test_unused_non_finite_embedding_does_no_harm(checkpoint):
    expected = clusterfusion.Engine(checkpoint, device="cpu").logits([3, 4])
    fill(checkpoint, "gpt_neox.embed_in.weight", 200 * 32, math.nan)
    np.testing.assert_array_equal(clusterfusion.Engine(checkpoint).logits([3, 4]), expected)


def test_overflow_without_a_bad_weight(tmp_path):
    """Finite weights whose product is not: says so, and does not blame a tensor."""
    folder = write_random_checkpoint(tmp_path, dtype="float32", **SETTING)
    header, data = read_parts(folder / WEIGHTS)
    begin, end = header[NORM]["data_offsets"]
    huge = np.full((end - begin) // 4, 3e38, np.float32).tobytes()
    write_parts(folder / WEIGHTS, header, data[:begin] + huge + data[end:])
    with pytest.raises(ArithmeticError, match=r"(?i)logits|overflow|finite"):
        clusterfusion.Engine(folder, device="cpu").logits([1, 2, 3])


# Requests that cannot be met.


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> clusterfusion.Engine:
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), tokenizer="train", **SETTING
    )
    return clusterfusion.Engine(folder, device="cpu")


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", ValueError, ["at least"]),
        (np.empty(0, np.int32), ValueError, ["at least"]),
        ([0] * 42, ValueError, ["42", "40"]),
        ([1, 300], IndexError, ["300", "1"]),
        ([1, 2, -1], IndexError, ["-1", "2"]),
        ([2**40], IndexError, [str(2**40)]),
        ([1.5], TypeError, ["float"]),
        (["a", 1], TypeError, ["prompt", "str"]),
        (None, TypeError, ["NoneType"]),
        (3, TypeError, ["int"]),
        ({"text": "a"}, TypeError, ["dict"]),
        ("\ud800", ValueError, ["surrogate"]),
        (np.array([[1, 2]]), ValueError, ["(1, 2)"]),
        (np.array([1.0]), TypeError, ["float64"]),
    ],
)
def test_impossible_prompt(engine, prompt, error, words):
    for call in (engine.generate, engine.logits, engine.score):
        with pytest.raises(error) as caught:
            call(prompt)
        message = str(caught.value)
        assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -0.1}, ValueError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 2.5}, TypeError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.1}, ValueError),
        ({"top_p": math.nan}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"min_p": 1.5}, ValueError),
        ({"repetition_penalty": 0.0}, ValueError),
        ({"repetition_penalty": -1.0}, ValueError),
        ({"repetition_penalty": math.inf}, ValueError),
        ({"logprobs": -1}, ValueError),
        ({"logprobs": 101}, ValueError),
        ({"max_new_tokens": -1}, ValueError),
        ({"max_new_tokens": True}, TypeError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"stop": ""}, ValueError),
        ({"stop": [3]}, TypeError),
        ({"stop_tokens": [300]}, IndexError),
    ],
    ids=str,
)
def test_impossible_option(engine, options, error):
    """The message names the option and the value that was found."""
    ((name, value),) = options.items()
    with pytest.raises(error) as caught:
        engine.generate([1, 2], **options)
    message = str(caught.value)
    assert name in message
    found = {"hot": "str", "": "empty"}.get(value if isinstance(value, str) else None)
    if found is None and not isinstance(value, list | bool) and error is not TypeError:
        found = f"{value:g}" if isinstance(value, float) else str(value)
    assert found is None or found in message, message


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"device": "cpu", "threads": -1}, ValueError, "threads"),
        ({"device": "cpu", "context": -1}, ValueError, "-1"),
        ({"device": "cpu", "context": 41}, ValueError, "41"),
        ({"device": "cpu", "kv_dtype": "int4"}, ValueError, "int4"),
    ],
)
def test_impossible_engine_option(checkpoint, options, error, word):
    with pytest.raises(error, match=word):
        clusterfusion.Engine(checkpoint, **options)


@pytest.mark.parametrize(
    "options",
    [{"context": 1}, {"context": 41}, {"stride": -1, "context": 8}, {"stride": 9, "context": 8}],
)
def test_impossible_window(engine, options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        engine.perplexity([1, 2, 3, 4], **options)


# Damage at random.


def damage_at_random(draw: random.Random, whole: bytes, size: int) -> bytes:
    """Flips, overwrites, removes or repeats some of the first `size` bytes, or cuts the file."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        place = draw.randrange(min(size, len(data)))
        action = draw.randrange(5)
        if action == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif action == 1:
            data[place] = draw.choice(b'0123456789{}[]",:-e. \0\xff')
        elif action == 2:
            del data[place : place + draw.choice([1, 1, 7, 300])]
        elif action == 3:
            data[place:place] = data[draw.randrange(size) :][: draw.choice([1, 2, 40])]
        else:
            del data[draw.randrange(len(data)) :]
        if not data:
            break
    return bytes(data)


def run_campaign(folder: str, file: str, seed: int, count: int) -> None:
    """Opens `count` damaged checkpoints; prints how many were refused and how many computed."""
    path = Path(folder) / file
    whole = path.read_bytes()
    size = len(whole) if file != WEIGHTS else 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(seed)
    refused = computed = 0
    for number in range(count):
        path.write_bytes(damage_at_random(draw, whole, size))
        print("case", number, file=sys.stderr)
        try:
            logits = clusterfusion.Engine(folder, device="cpu", threads=1).logits([1, 2, 3])
        except CLEAN_ERRORS as error:
            message = str(error)
            assert folder in message or "token" in message or "tensor" in message, message
            refused += 1
        else:
            assert np.isfinite(logits).all()
            computed += 1
    print(refused, computed)


@pytest.mark.parametrize(
    ("file", "shards"), [(WEIGHTS, 1), (CONFIG, 1), (INDEX, 2), ("tokenizer.json", 1)]
)
@pytest.mark.parametrize("seed", range(2))
def test_random_damage(tmp_path, file, shards, seed):
    """Flipped, inserted, repeated and missing bytes: a clean exception or finite logits.

    In a process of its own, so that a crash is seen as one.
    """
    setting = SETTING | {"hidden_size": 8, "num_heads": 1, "num_layers": 1, "vocab_size": 270}
    folder = write_random_checkpoint(tmp_path, shards=shards, tokenizer="train", **setting)
    count = 500 if file != "tokenizer.json" else 150
    call = f"run_campaign({str(folder)!r}, {file!r}, {seed}, {count})"
    ended = subprocess.run(
        [sys.executable, "-c", f"from test_bad_input import run_campaign; {call}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    refused, computed = map(int, ended.stdout.split())
    assert refused + computed == count
    assert refused > count / 4
