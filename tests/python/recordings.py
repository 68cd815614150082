"""Recordings of transformers in tests/data, as tools/record_reference.py wrote them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class FamilyRecord:
    """One random checkpoint and what transformers computed with it."""

    setting: dict  # arguments of write_random_checkpoint
    digest: str  # weights_digest() of the checkpoint
    errors: dict[str, float]  # relative L2 error of "<attention>_<dtype>" against float64
    tokens: np.ndarray  # the prompt
    positions: np.ndarray  # where the following were recorded
    sampled: np.ndarray  # vocabulary entries whose logits were recorded
    logits: np.ndarray  # float64 [positions, sampled]
    log_sum_exp: np.ndarray  # float64 [positions], over the whole vocabulary
    norm: np.ndarray  # float64 [positions], L2 norm over the whole vocabulary
    greedy: np.ndarray  # continuation of tokens[:9]
    margins: np.ndarray  # of each greedy token's logit over the next one's

    @property
    def dtype(self) -> str:
        return self.setting.get("dtype", "float16")

    @property
    def name(self) -> str:
        hidden = self.setting.get("hidden_size", 64)
        head_dim = hidden // self.setting.get("num_heads", 4)
        return f"{self.setting['seed']}-{self.dtype}-head{head_dim}"


def load_family(name: str = "family") -> list[FamilyRecord]:
    """Those of "family" (GPT-NeoX) or "llama" (Llama, Mistral, Qwen2 and Qwen3)."""
    file = np.load(DATA / f"{name}_reference.npz")
    records = []
    for number in range(json.loads(str(file["meta"]))["count"]):
        arrays = {
            name.partition("/")[2]: file[name]
            for name in file.files
            if name.startswith(f"{number}/")
        }
        meta = json.loads(str(arrays.pop("meta")))
        records.append(FamilyRecord(**meta, **arrays))
    return records


@dataclass(frozen=True)
class DemoRecord:
    """What transformers in float32 computed with the demo model."""

    digest: str  # weights_digest() of the model
    prompts: list[list[int]]
    tokens: np.ndarray  # [prompts, 64]: their greedy continuations
    margins: np.ndarray  # of each greedy token's logit over the next one's
    perplexities: list[dict]  # of texts, windows and strides
    perplexity_tokens: list[np.ndarray]  # the texts' tokens


def load_demo() -> DemoRecord:
    with np.load(DATA / "demo_reference.npz") as file:
        meta = json.loads(str(file["meta"]))
        perplexities = meta["perplexities"]
        return DemoRecord(
            digest=meta["digest"],
            prompts=[row[1 : 1 + row[0]].tolist() for row in file["prompts"]],
            tokens=file["tokens"],
            margins=file["margins"],
            perplexities=perplexities,
            perplexity_tokens=[file[f"perplexity_tokens_{i}"] for i in range(len(perplexities))],
        )


@dataclass(frozen=True)
class SmolLM2Record:
    """What transformers in float32 computed with SmolLM2-135M-Instruct."""

    digest: str  # weights_digest() of the model
    prompts: list[list[int]]
    greedy: np.ndarray  # [prompts, 32]: their greedy continuations
    margins: np.ndarray  # of each greedy token's logit over the next one's
    texts: list[dict]  # of the shared data: name, bytes, digest, window, stride, perplexity
    text_tokens: list[np.ndarray]
    encoded: list[tuple[str, list[int]]]  # strings and their tokens


def load_smollm2() -> SmolLM2Record:
    with np.load(DATA / "smollm2_reference.npz") as file:
        meta = json.loads(str(file["meta"]))
        tokens = file["tokens"].astype(np.int64)
        ends = np.cumsum([text["tokens"] for text in meta["perplexities"]])
        return SmolLM2Record(
            digest=meta["digest"],
            prompts=[tokens[begin:][:length].tolist() for begin, length in file["prompts"]],
            greedy=file["greedy"].astype(np.int64),
            margins=file["margins"],
            texts=meta["perplexities"],
            text_tokens=np.split(tokens, ends)[: len(ends)],
            encoded=[tuple(pair) for pair in meta["encoded"]],
        )
