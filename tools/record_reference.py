"""Record what `transformers` computes, for tests that run where it is not installed.

    python tools/record_reference.py family            # tests/data/family_reference.npz
    python tools/record_reference.py llama             # tests/data/llama_reference.npz
    python tools/record_reference.py demo              # tests/data/demo_reference.npz
    python tools/record_reference.py smollm2 FOLDER    # tests/data/smollm2_reference.npz

FOLDER is what tools/unpack_smollm2.py wrote, in float32.

Needs torch, transformers, NumPy, safetensors and tokenizers. Checkpoints of the families are not
stored: checkpoints.py and llama_checkpoints.py in tests/python make them again from their settings,
and a digest tells whether they still make the same ones.
"""

import argparse
import hashlib
import json
import lzma
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))

from checkpoints import weights_digest, write_random_checkpoint  # noqa: E402
from llama_checkpoints import (  # noqa: E402
    ARCHITECTURES,
    ROPE_SCALINGS,
    write_llama_checkpoint,
)
from peers import (  # noqa: E402
    load_transformers,
    transformers_greedy,
    transformers_logits,
    transformers_perplexity,
    versions,
)
from reference_model import ACTIVATIONS, log_softmax, relative_error  # noqa: E402

SHARED_DATA = ROOT.parent / "shared" / "data"
TEST_DATA = ROOT / "tests" / "data"

VOCAB_SAMPLES = 24  # logits stored a position; the log-sum-exp stands for the others
GREEDY_TOKENS = 24
DEMO_PROMPTS, DEMO_TOKENS = 200, 64
# Text, bytes of it, and the window's length and stride as shares of the model's longest context.
DEMO_PERPLEXITIES = [
    ("novels-valid.txt.xz", 60_000, 1.0, 0.5),
    ("novels-valid.txt.xz", 30_000, 0.25, 0.1),
    ("wikitext-2-test.txt", 60_000, 1.0, 0.5),
]


def family_settings() -> list[dict]:
    """Return settings for write_random_checkpoint that span the GPT-NeoX family."""
    rotary = cycle([0.25, 1.0, 0.5, 0.375, 0.25, 0.75, 0.125])
    theta = cycle([10000.0, 500000.0, 10000.0, 123.5])
    layers = cycle([1, 3, 2, 5])
    activation = cycle(ACTIVATIONS)
    vocab = cycle([320, 257, 1001])
    settings = []
    for head_dim, dtype, parallel in product(
        (16, 32, 64, 80, 128, 256), ("float16", "bfloat16", "float32"), (True, False)
    ):
        number = len(settings)
        num_heads = {16: 5, 32: 3, 64: 2, 80: 2, 128: 2, 256: 1}[head_dim]
        hidden = head_dim * num_heads
        settings.append(
            {
                "hidden_size": hidden,
                "num_layers": next(layers),
                "num_heads": num_heads,
                "intermediate_size": (4 * hidden, 3 * hidden + 7, 2 * hidden)[number % 3],
                "vocab_size": next(vocab),
                "max_positions": 256,
                "rotary_pct": next(rotary),
                "rope_theta": next(theta),
                "hidden_act": "gelu" if number % 2 else next(activation),
                "parallel_residual": parallel,
                "tied": number % 5 == 4,
                "dtype": dtype,
                "seed": 1000 + number,
                "prefix": number % 7 != 3,
                "shards": 1 + (number % 4 == 2) * 2,
                "attention_bias": number % 6 != 5,
                "config_style": "new" if number % 3 == 1 else "old",
                "with_buffers": number % 8 == 6,
                "head_name": "lm_head" if number % 3 == 2 else "embed_out",
            }
        )
    for number, name in enumerate(ACTIVATIONS):
        settings.append({"hidden_act": name, "dtype": "float32", "seed": 2000 + number})
    # An odd number of rotary values (transformers rotates one more) and none.
    settings.append({"hidden_size": 80, "rotary_pct": 0.25, "dtype": "float32", "seed": 3000})
    settings.append({"rotary_pct": 0.0, "dtype": "float32", "seed": 3001})
    # A long prompt.
    settings.append({"num_layers": 1, "max_positions": 1024, "seed": 3002})
    return settings


def llama_settings() -> list[dict]:
    """Return settings for write_llama_checkpoint: each family with each scaling of the rotation."""
    heads = cycle([(9, 3, 64), (4, 2, None), (6, 1, 34), (5, 5, 16), (8, 2, 128)])
    hidden = cycle([100, 64, 120, 75, 96, 60])
    theta = cycle([10000.0, 500000.0, 1000000.0])
    dtype = cycle(["float16", "bfloat16", "float32", "bfloat16", "float32", "float16", "float32"])
    settings = []
    for family, rope in product(ARCHITECTURES, ROPE_SCALINGS):
        number = len(settings)
        num_heads, num_kv_heads, head_dim = next(heads)
        if family == "qwen3" and head_dim is None:
            head_dim = 48
        hidden_size = next(hidden)
        if family == "llama":  # transformers 5 wants a multiple there
            hidden_size = 11 * num_heads
        settings.append(
            {
                "family": family,
                "hidden_size": 16 * num_heads if head_dim is None else hidden_size,
                "num_layers": 1 + number % 3,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "intermediate_size": (77, 160, 250)[number % 3],
                "vocab_size": (320, 257, 501)[number % 3],
                "rope": rope,
                "rope_theta": next(theta),
                "eps": (1e-6, 1e-5)[number % 2],
                "attention_bias": number % 4 < 2,
                "mlp_bias": number % 3 == 0,
                "tied": number % 5 == 4,
                "dtype": next(dtype),
                "seed": 4000 + number,
                "prefix": number % 7 != 3,
                "shards": 1 + (number % 4 == 2) * 2,
                "config_style": "new" if number % 2 else "old",
            }
        )
    return settings


def tokens_of(setting: dict) -> np.ndarray:
    """Return the recorded prompt, of a length that differs from setting to setting."""
    seed = setting["seed"]
    count = 700 if setting.get("max_positions") == 1024 else 33 + seed * 13 % 101
    return np.random.PCG64(seed).random_raw(count) % setting.get("vocab_size", 320)


def record_checkpoint(setting: dict, write: Callable[..., Path]) -> dict[str, np.ndarray]:
    """Compute everything that is stored about one checkpoint, which `write` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **setting)
        digest = weights_digest(folder)
        dtype = setting.get("dtype", "float16")
        tokens = tokens_of(setting)
        exact = transformers_logits(folder, tokens, "float64")
        errors = {
            f"{attention}_{kind}": relative_error(
                transformers_logits(folder, tokens, kind, attention), exact
            )
            for attention, kind in product(("sdpa", "eager"), {dtype, "float32"})
        }
        model = load_transformers(folder, "float64")
        greedy, margins = transformers_greedy(model, tokens[None, :9], GREEDY_TOKENS)
    sampled = np.unique(np.linspace(0, exact.shape[1] - 1, VOCAB_SAMPLES).astype(np.int64))
    log_sum_exp = exact[:, 0] - log_softmax(exact)[:, 0]
    positions = np.arange(len(tokens)) if len(tokens) < 256 else np.arange(0, len(tokens), 7)
    return {
        "meta": np.array(json.dumps({"setting": setting, "digest": digest, "errors": errors})),
        "tokens": tokens.astype(np.int32),
        "positions": positions.astype(np.int32),
        "sampled": sampled.astype(np.int32),
        "logits": exact[positions][:, sampled],
        "log_sum_exp": log_sum_exp[positions],
        "norm": np.linalg.norm(exact, axis=1)[positions],
        "greedy": greedy[0].astype(np.int32),
        "margins": margins[0].astype(np.float32),
    }


def record_family(path: Path, settings: list[dict], write: Callable[..., Path]) -> None:
    """Record random checkpoints of the whole family: float64 logits, errors in other types."""
    arrays = {"meta": np.array(json.dumps({"versions": versions(), "count": len(settings)}))}
    for number, setting in enumerate(settings):
        record = record_checkpoint(setting, write)
        arrays |= {f"{number}/{name}": value for name, value in record.items()}
        print(f"{number + 1}/{len(settings)} {record['meta']}", file=sys.stderr)
    np.savez_compressed(path, **arrays)


def read_text(name: str) -> str:
    """Read a text of the shared data."""
    data = (SHARED_DATA / name).read_bytes()
    return (lzma.decompress(data) if name.endswith(".xz") else data).decode()


def demo_prompts(tokens: np.ndarray) -> np.ndarray:
    """Return rows of [length, tokens..., -1...]: pieces of the text, of 1 to 40 tokens."""
    rows = np.full((DEMO_PROMPTS, 41), -1, np.int32)
    starts = np.linspace(0, len(tokens) - 40, DEMO_PROMPTS).astype(int)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        row[0] = 1 + number * 7 % 40
        row[1 : 1 + row[0]] = tokens[start : start + row[0]]
    return rows


def record_demo(path: Path) -> None:
    """Record greedy texts and perplexities of the demo model by transformers in float32."""
    folder = ROOT / "models" / "demo"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load_transformers(folder, "float32")
    prompts = demo_prompts(np.array(tokenizer.encode(read_text("novels-valid.txt.xz")).ids))
    tokens = np.zeros((DEMO_PROMPTS, DEMO_TOKENS), np.int32)
    margins = np.zeros((DEMO_PROMPTS, DEMO_TOKENS), np.float32)
    for length in np.unique(prompts[:, 0]):
        chosen = prompts[:, 0] == length
        tokens[chosen], margins[chosen] = transformers_greedy(
            model, prompts[chosen, 1 : 1 + length], DEMO_TOKENS
        )
        print(f"prompts of {length} tokens", file=sys.stderr)
    arrays = {"prompts": prompts, "tokens": tokens, "margins": margins}
    longest = model.config.max_position_embeddings
    perplexities = []
    for number, (name, num_bytes, context_share, stride_share) in enumerate(DEMO_PERPLEXITIES):
        text = read_text(name).encode()[:num_bytes].decode(errors="ignore")
        ids = np.array(tokenizer.encode(text).ids, np.int32)
        window = {"context": int(longest * context_share), "stride": int(longest * stride_share)}
        result = transformers_perplexity(model, ids, **window)
        digest = hashlib.sha256(text.encode()).hexdigest()
        source = {"text": name, "bytes": len(text.encode()), "sha256": digest}
        perplexities.append(source | window | result)
        arrays[f"perplexity_tokens_{number}"] = ids
        print(perplexities[-1], file=sys.stderr)
    meta = {
        "versions": versions(),
        "digest": weights_digest(folder),
        "perplexities": perplexities,
    }
    np.savez_compressed(path, meta=np.array(json.dumps(meta)), **arrays)


SMOLLM2_PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):\n",
    "Water boils at",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n",
    "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nIs water wet?<|im_end|>\n"
    "<|im_start|>assistant\n",
)
# Eight more prompts of each length, on both sides of a KV page's border among them.
SMOLLM2_LENGTHS = (
    *(1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 63, 64, 65, 90),
    *(128, 160, 210, 280, 370, 500, 720, 1000),
)
SMOLLM2_OF_A_LENGTH, SMOLLM2_TOKENS = 8, 32
# Text, bytes of it, and window and stride of its perplexity.
SMOLLM2_TEXTS = [
    ("novels-valid.txt.xz", 24_000, 1024, 512),
    ("wikitext-2-test.txt", 12_000, 256, 100),
]
SMOLLM2_ENCODED = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\t tabs\r\n",
    "It's we'll they'd I'M DON'T",
    "3.14159 and 1,000,000 or 0x7fff",
    "na\u00efve caf\u00e9 cafe\u0301 \u00dcber stra\u00dfe",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufffd\u0000",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }  // sum",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "a<|im_start|>b <|unknown|> <|im_end",
    "https://example.org/a?b=c&d=%20#e",
    "x" * 300,
    "\u00a0\u3000\u2028 unusual white space",
)


def smollm2_prompts(
    tokenizer: Tokenizer, texts: list[np.ndarray]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return tokens, and where prompts lie in them: begin and length."""
    short = [np.array(tokenizer.encode(prompt).ids) for prompt in SMOLLM2_PROMPTS]
    tokens = np.concatenate([*texts, *short])
    ends = len(tokens) - sum(map(len, short)) + np.cumsum([len(ids) for ids in short])
    places = [(int(end) - len(ids), len(ids)) for end, ids in zip(ends, short, strict=True)]
    count = len(SMOLLM2_LENGTHS) * SMOLLM2_OF_A_LENGTH
    last = sum(map(len, texts)) - max(SMOLLM2_LENGTHS)
    for number, begin in enumerate(np.linspace(0, last, count).astype(int)):
        places.append((int(begin), SMOLLM2_LENGTHS[number % len(SMOLLM2_LENGTHS)]))
    return tokens, places


def record_smollm2(path: Path, folder: Path) -> None:
    """Record what transformers in float32 makes of SmolLM2-135M-Instruct, and its tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load_transformers(folder, "float32")
    texts, perplexities = [], []
    for name, num_bytes, context, stride in SMOLLM2_TEXTS:
        text = read_text(name).encode()[:num_bytes].decode(errors="ignore")
        texts.append(np.array(tokenizer.encode(text).ids))
        result = transformers_perplexity(model, texts[-1], context, stride)
        perplexities.append(
            {
                "text": name,
                "bytes": len(text.encode()),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "tokens": len(texts[-1]),
                "context": context,
                "stride": stride,
                "perplexity": result["perplexity"],
            }
        )
        print(perplexities[-1], file=sys.stderr)
    tokens, places = smollm2_prompts(tokenizer, texts)
    greedy = np.zeros((len(places), SMOLLM2_TOKENS), np.uint16)
    margins = np.zeros(greedy.shape, np.float32)
    for length in sorted({length for _, length in places}):
        chosen = [number for number, place in enumerate(places) if place[1] == length]
        prompts = [tokens[places[number][0] :][:length] for number in chosen]
        greedy[chosen], margins[chosen] = transformers_greedy(
            model, np.array(prompts), SMOLLM2_TOKENS
        )
        print(f"{len(chosen)} prompts of {length} tokens", file=sys.stderr)
    meta = {
        "versions": versions(),
        "digest": weights_digest(folder),
        "perplexities": perplexities,
        "encoded": [[text, tokenizer.encode(text).ids] for text in SMOLLM2_ENCODED],
    }
    np.savez_compressed(
        path,
        meta=np.array(json.dumps(meta)),
        tokens=tokens.astype(np.uint16),
        prompts=np.array(places, np.int32),
        greedy=greedy,
        margins=margins,
    )


def main() -> None:
    """Record what the command line asks for."""
    parser = argparse.ArgumentParser(description="Record reference outputs of transformers.")
    parser.add_argument("what", choices=["family", "llama", "demo", "smollm2"])
    parser.add_argument("folder", nargs="?", type=Path, help="of SmolLM2")
    options = parser.parse_args()
    what = options.what
    TEST_DATA.mkdir(exist_ok=True)
    if what == "family":
        record_family(
            TEST_DATA / "family_reference.npz", family_settings(), write_random_checkpoint
        )
    elif what == "llama":
        record_family(TEST_DATA / "llama_reference.npz", llama_settings(), write_llama_checkpoint)
    elif what == "smollm2":
        if options.folder is None:
            parser.error("smollm2: expected a folder that tools/unpack_smollm2.py wrote")
        record_smollm2(TEST_DATA / "smollm2_reference.npz", options.folder)
    else:
        record_demo(TEST_DATA / "demo_reference.npz")


if __name__ == "__main__":
    main()
