"""Random GPT-NeoX checkpoints in Hugging Face layout, the same bytes from the same seed everywhere.

Weights come from raw integers of a fixed bit generator, so they do not depend on the version of
NumPy. Nothing here needs torch: NumPy and, for a tokenizer, `tokenizers`.

As a program it writes checkpoints in the shapes of the Pythia suite, streamed, with little memory:

    python tests/python/checkpoints.py --shape pythia-410m --dtype float16 OUT
"""

import argparse
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# layers, hidden, heads, intermediate, vocabulary: config.json of EleutherAI/pythia-*.
PYTHIA_SHAPES = {
    "pythia-14m": (6, 128, 4, 512, 50304),
    "pythia-31m": (6, 256, 8, 1024, 50304),
    "pythia-70m": (6, 512, 8, 2048, 50304),
    "pythia-160m": (12, 768, 12, 3072, 50304),
    "pythia-410m": (24, 1024, 16, 4096, 50304),
    "pythia-1b": (16, 2048, 8, 8192, 50304),
    "pythia-1.4b": (24, 2048, 16, 8192, 50304),
    "pythia-2.8b": (32, 2560, 32, 10240, 50304),
    "pythia-6.9b": (32, 4096, 32, 16384, 50432),
    "pythia-12b": (36, 5120, 40, 20480, 50688),
}

DTYPE_TAGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "U8": 1, "BOOL": 1}
TORCH_STORAGES = {
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "F32": "FloatStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
BLOCK_ELEMENTS = 1 << 22  # generated at a time, so that memory stays bounded


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `blocks` yields its bytes in order."""

    name: str
    tag: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.tag]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 to the bits of bfloat16 (uint16), rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, tag: str) -> np.ndarray:
    """Float32 values as they are stored under a safetensors dtype tag."""
    if tag == "BF16":
        return to_bfloat16(values)
    return values.astype(np.float16 if tag == "F16" else np.float32)


def random_blocks(
    seed: int, name: str, count: int, mean: float, std: float
) -> Iterator[np.ndarray]:
    """Float32 values with a triangular distribution, in blocks; a function of seed and name.

    Each is the sum of two uniform 16-bit integers, which has the standard deviation
    sqrt((2**32 - 1) / 6), shifted and scaled: no step depends on a random distribution's code.
    """
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    generator = np.random.PCG64(int.from_bytes(key, "little"))
    scale = np.float32(std / np.sqrt((2.0**32 - 1) / 6))
    for start in range(0, count, BLOCK_ELEMENTS):
        size = min(BLOCK_ELEMENTS, count - start)
        halves = generator.random_raw((size + 1) // 2).view(np.uint16).reshape(-1, 2)
        sums = halves[:, 0].astype(np.int32) + halves[:, 1] - 65535
        yield sums[:size].astype(np.float32) * scale + np.float32(mean)


def rotary_dim_of(head_dim: int, rotary_pct: float) -> int:
    return int(head_dim * rotary_pct)


class TensorList:
    """The tensors of a checkpoint, in the order they are added in.

    tags: dtypes of the matrices and of the vectors.
    """

    def __init__(self, tags: tuple[str, str], seed: int, head_name: str) -> None:
        self.tags, self.seed, self.head_name = tags, seed, head_name
        self.tensors: list[Tensor] = []

    def add(self, name: str, shape: tuple[int, ...], mean: float, std: float) -> None:
        count = int(np.prod(shape, dtype=np.int64))
        tag = self.tags[0] if len(shape) == 2 else self.tags[1]
        # The values do not depend on how the name is spelled, nor on the dtype (but for rounding).
        is_head = name == f"{self.head_name}.weight"
        key = "head" if is_head else name.removeprefix("gpt_neox.").removeprefix("model.")
        blocks = partial(random_blocks, self.seed, key, count, mean, std)
        self.tensors.append(
            Tensor(name, tag, shape, lambda: (encode(block, tag) for block in blocks()))
        )

    def add_array(self, name: str, tag: str, values: np.ndarray) -> None:
        self.tensors.append(Tensor(name, tag, values.shape, lambda: iter([values])))

    def add_norm(self, name: str, size: int) -> None:
        self.add(f"{name}.weight", (size,), 1.0, 0.2)
        self.add(f"{name}.bias", (size,), 0.0, 0.1)

    def add_linear(
        self, name: str, rows: int, columns: int, gain: float, bias: bool = True
    ) -> None:
        self.add(f"{name}.weight", (rows, columns), 0.0, gain / np.sqrt(columns))
        if bias:
            self.add(f"{name}.bias", (rows,), 0.0, 0.2)

    def add_buffers(self, layer: str, config: dict, mask_tag: str) -> None:
        """What old checkpoints hold and nobody reads."""
        positions = config["max_position_embeddings"]
        rope = config.get("rope_parameters", {})
        rotary_pct = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        theta = rope.get("rope_theta", config.get("rotary_emb_base", 10000))
        mask = np.tril(np.ones((positions, positions), np.uint8))[None, None]
        self.add_array(f"{layer}.attention.bias", mask_tag, mask)
        lowest = encode(np.array(-65504.0, np.float32), self.tags[0])
        self.add_array(f"{layer}.attention.masked_bias", self.tags[0], lowest)
        dim = rotary_dim_of(config["hidden_size"] // config["num_attention_heads"], rotary_pct)
        inv_freq = (1.0 / theta ** (np.arange(0, dim, 2) / max(dim, 1))).astype(np.float32)
        self.add_array(f"{layer}.attention.rotary_emb.inv_freq", "F32", inv_freq)


def list_tensors(
    config: dict,
    tags: tuple[str, str],
    seed: int,
    *,
    prefix: bool,
    head_name: str,
    with_buffers: bool,
) -> list[Tensor]:
    """All tensors of a checkpoint with this configuration, in the order of the model.

    tags: dtypes of the matrices and of the vectors.
    """
    hidden, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    start = "gpt_neox." if prefix else ""
    found = TensorList(tags, seed, head_name)
    # Gains keep the residual stream near unit size, attention neither flat nor one-hot, and the
    # logits a few units wide.
    logit_std = 2.5 / np.sqrt(hidden)
    tied = config["tie_word_embeddings"]
    found.add(f"{start}embed_in.weight", (vocab, hidden), 0.0, logit_std if tied else 0.5)
    for index in range(config["num_hidden_layers"]):
        layer = f"{start}layers.{index}"
        found.add_norm(f"{layer}.input_layernorm", hidden)
        found.add_norm(f"{layer}.post_attention_layernorm", hidden)
        if with_buffers:
            found.add_buffers(layer, config, "BOOL" if index % 2 == 0 else "U8")
        attention_bias = config["attention_bias"]
        found.add_linear(
            f"{layer}.attention.query_key_value", 3 * hidden, hidden, 1.2, attention_bias
        )
        found.add_linear(f"{layer}.attention.dense", hidden, hidden, 1.0, attention_bias)
        found.add_linear(f"{layer}.mlp.dense_h_to_4h", inner, hidden, 1.0)
        found.add_linear(f"{layer}.mlp.dense_4h_to_h", hidden, inner, 0.7)
    found.add_norm(f"{start}final_layer_norm", hidden)
    if not tied:
        found.add(f"{head_name}.weight", (vocab, hidden), 0.0, logit_std)
    return found.tensors


def write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """Streams tensors into a file: https://huggingface.co/docs/safetensors/index#format.

    Wide elements come first, as the format's own library puts them, so that each is aligned.
    """
    tensors = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.tag])
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.tag,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block).data)


def pickled_tensor(tensor: Tensor, key: str) -> bytes:
    """The instructions of a pickle (protocol 2) that torch.save writes for a tensor."""

    def integer(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little")

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    def sequence(items: list[bytes]) -> bytes:
        return b"(" + b"".join(items) + b"t"

    count = int(np.prod(tensor.shape, dtype=np.int64))
    strides = [
        int(np.prod(tensor.shape[i + 1 :], dtype=np.int64)) for i in range(len(tensor.shape))
    ]
    kind = name("torch", TORCH_STORAGES[tensor.tag])
    storage = sequence([text("storage"), kind, text(key), text("cpu"), integer(count)]) + b"Q"
    size = sequence([integer(extent) for extent in tensor.shape])
    stride = sequence([integer(step) for step in strides])
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = sequence([storage, integer(0), size, stride, b"\x89", hooks])
    return text(tensor.name) + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def write_torch_file(path: Path, tensors: list[Tensor]) -> None:
    """Streams tensors into a file as torch.save(state_dict) writes it, without torch."""
    entries = b"".join(pickled_tensor(tensor, str(i)) for i, tensor in enumerate(tensors))
    pickle = b"\x80\x02ccollections\nOrderedDict\n)R(" + entries + b"u."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, blocks: Iterator[Any]) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            zip64_bytes = 20
            end = archive.start_dir + 30 + len(info.filename) + zip64_bytes + 4
            padding = -end % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as entry:
                for block in blocks:
                    entry.write(np.ascontiguousarray(block).data)

        def add_bytes(name: str, content: bytes) -> None:
            add(name, iter([np.frombuffer(content, np.uint8)]))

        add_bytes("data.pkl", pickle)
        add_bytes("byteorder", b"little")
        for i, tensor in enumerate(tensors):
            add(f"data/{i}", tensor.blocks())
        add_bytes("version", b"3\n")


def split_into_shards(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Consecutive, non-empty groups of about the same number of bytes."""
    shards = min(shards, len(tensors))
    total = sum(tensor.num_bytes for tensor in tensors)
    groups: list[list[Tensor]] = [[]]
    done = 0
    for index, tensor in enumerate(tensors):
        open_groups = shards - len(groups)
        full = done >= total * len(groups) / shards or len(tensors) - index == open_groups
        if groups[-1] and open_groups > 0 and full:
            groups.append([])
        groups[-1].append(tensor)
        done += tensor.num_bytes
    return groups


def write_weights(folder: Path, tensors: list[Tensor], shards: int, weights: str) -> None:
    """model.safetensors or pytorch_model.bin, or shards with an index."""
    formats = {
        "safetensors": ("model", "safetensors", write_safetensors),
        "torch": ("pytorch_model", "bin", write_torch_file),
    }
    stem, suffix, write = formats[weights]
    if shards == 1:
        write(folder / f"{stem}.{suffix}", tensors)
        return
    groups = split_into_shards(tensors, shards)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
        write(folder / name, group)
        weight_map.update({tensor.name: name for tensor in group})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def rotary_config(style: str, rotary_pct: float, theta: float, dtype: str) -> dict:
    """The part of a configuration that is spelled in two ways: see write_random_checkpoint()."""
    if style == "old":
        return {"rotary_pct": rotary_pct, "rotary_emb_base": theta, "torch_dtype": dtype}
    if style == "new":
        rope = {"partial_rotary_factor": rotary_pct, "rope_theta": theta, "rope_type": "default"}
        return {"rope_parameters": rope, "dtype": dtype}
    raise ValueError(f"config_style must be 'old' or 'new', not {style!r}")


def make_config(
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    vocab_size: int = 320,
    max_positions: int = 256,
    rotary_pct: float = 0.25,
    rope_theta: float = 10000.0,
    hidden_act: str = "gelu",
    parallel_residual: bool = True,
    tied: bool = False,
    dtype: str = "float16",
    attention_bias: bool = True,
    config_style: str = "old",
) -> dict:
    """What config.json says of a model.

    intermediate_size: rows of the MLP's first matrix; None: four times hidden_size.
    dtype: "float16", "bfloat16" or "float32", of every weight.
    config_style: "old" spells rotary_pct and rotary_emb_base, "new" rope_parameters.
    """
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * hidden_size if intermediate_size is None else intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": parallel_residual,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        **rotary_config(config_style, rotary_pct, rope_theta, dtype),
    }


def write_random_checkpoint(
    folder: Path | str,
    *,
    dtype: str = "float16",
    seed: int = 0,
    prefix: bool = True,
    shards: int = 1,
    with_buffers: bool = False,
    head_name: str = "embed_out",
    vector_dtype: str | None = None,
    tokenizer: str | None = None,
    weights: str = "safetensors",
    **config_options: Any,
) -> Path:
    """Writes a checkpoint folder and returns its path.

    dtype: "float16", "bfloat16" or "float32", of every weight.
    prefix: tensor names begin with "gpt_neox." (but for the head).
    with_buffers: adds the buffers that old checkpoints hold and that nobody reads.
    head_name: the LM head's name, "embed_out" (Pythia) or "lm_head" (transformers 5).
    vector_dtype: of biases and LayerNorm parameters; None: `dtype`.
    tokenizer: "train" adds a tokenizer.json of at most vocab_size tokens.
    weights: "safetensors", or "torch" for pytorch_model.bin.
    config_options: those of make_config().
    """
    config = make_config(dtype=dtype, **config_options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tags = (DTYPE_TAGS[dtype], DTYPE_TAGS[vector_dtype or dtype])
    tensors = list_tensors(
        config, tags, seed, prefix=prefix, head_name=head_name, with_buffers=with_buffers
    )
    write_weights(folder, tensors, shards, weights)
    if tokenizer == "train":
        train_tokenizer(folder, config["vocab_size"])
    elif tokenizer is not None:
        raise ValueError(f"tokenizer must be None or 'train', not {tokenizer!r}")
    return folder


def transformers_config(shape: str) -> Any:
    """transformers' configuration (GPTNeoXConfig) of one of PYTHIA_SHAPES."""
    from transformers import GPTNeoXConfig

    layers, hidden, heads, inner, vocab = PYTHIA_SHAPES[shape]
    return GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_pythia_checkpoint(
    folder: Path | str,
    shape: str,
    dtype: str = "float16",
    seed: int = 0,
    max_shard_bytes: int = 10 << 30,
    tokenizer: str | None = None,
    weights: str = "safetensors",
) -> Path:
    """Random weights in the shape of one of PYTHIA_SHAPES, streamed, in shards if it is large."""
    layers, hidden, heads, inner, vocab = PYTHIA_SHAPES[shape]
    per_layer = hidden * (4 * hidden + 2 * inner + 9) + inner
    total = (layers * per_layer + 2 * vocab * hidden) * DTYPE_BYTES[DTYPE_TAGS[dtype]]
    return write_random_checkpoint(
        folder,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_positions=2048,
        dtype=dtype,
        seed=seed,
        shards=-(-total // max_shard_bytes),
        tokenizer=tokenizer,
        weights=weights,
    )


PASSAGE = """\
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of
Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair, we
had everything before us, we had nothing before us. "Don't you think so?" she said; and they'll
say we're 21 or 42, naïve café-goers, before 1859 is over. It is a truth universally acknowledged,
that a single man in possession of a good fortune, must be in want of a wife.
"""


def training_text(num_words: int = 20000) -> Iterator[str]:
    """English, and words of syllables, enough of them for thousands of merges."""
    yield from PASSAGE.splitlines(keepends=True) * 8
    onsets = [*"bcdfghlmnprst", "th", "w", "st"]
    vowels = [*"aeiou", "ea", "ou"]
    codas = ["", "n", "r", "s", "t", "ng", "ll", "ed"]
    raw = np.random.PCG64(1859).random_raw(3 * num_words)
    syllables = [
        onsets[int(r) % 16] + vowels[(int(r) >> 8) % 7] + codas[(int(r) >> 16) % 8] for r in raw
    ]
    words = ["".join(syllables[3 * i : 3 * i + 1 + i % 3]) for i in range(num_words)]
    yield from (" ".join(words[i : i + 10]) + ".\n" for i in range(0, num_words, 10))


def train_tokenizer(folder: Path | str, vocab_size: int) -> Path:
    """Writes tokenizer.json: a byte-level BPE of at most vocab_size (> 256) tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    path = Path(folder) / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def weights_digest(folder: Path | str) -> str:
    """SHA-256 over the bytes of all safetensors files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a Pythia shape.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--shape", choices=PYTHIA_SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPE_TAGS, default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int, default=10 << 30)
    parser.add_argument("--tokenizer", choices=["train"], help="train a tokenizer as well")
    options = parser.parse_args()
    write_pythia_checkpoint(
        options.folder,
        options.shape,
        options.dtype,
        options.seed,
        options.max_shard_bytes,
        options.tokenizer,
    )


if __name__ == "__main__":
    main()
