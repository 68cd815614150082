#!/usr/bin/env python3
"""Record which tokens transformers' logits processors keep.

Writes tests/data/sampling_reference.json, which tests/unit/sampling reads. Needs torch and
transformers. The processors run in float64 on logits that are multiples of 2^-12, so that the
float32 logits of the test are the same numbers.
"""

import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SEED = 20240
NUM_CASES = 240
OUTPUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "sampling_reference.json"


def random_logits(rng: np.random.Generator, vocab: int, ties: bool) -> np.ndarray:
    """Return float64 [vocab] multiples of 2^-12: with many ties, or all different."""
    if ties:
        return rng.integers(-6, 6, size=vocab) / 2.0
    spread = int(rng.choice([1, 4, 16])) * 4096
    return rng.choice(np.arange(-spread, spread), size=vocab, replace=False) / 4096.0


def record_case(rng: np.random.Generator) -> dict:
    """Draw one case and run transformers' processors over it."""
    vocab = int(rng.choice([1, 2, 5, 17, 64, 200]))
    # Among tokens of equal probability transformers' top-p keeps whichever its sort put last, so
    # ties go with the other filters only.
    ties = bool(rng.random() < 0.3)
    logits = random_logits(rng, vocab, ties)
    logits[rng.random(vocab) < float(rng.choice([0.0, 0.0, 0.2]))] = -np.inf
    if np.isneginf(logits).all():
        logits[0] = 0.5
    case = {
        "temperature": float(np.float32(rng.choice([0.25, 0.7, 1.0, 1.5, 4.0]))),
        "top_k": int(rng.choice([0, 1, 3, 10, 50, 1000])),
        "top_p": 1.0 if ties else float(np.float32(rng.choice([0.05, 0.5, 0.9, 0.99, 1.0]))),
        "min_p": float(np.float32(rng.choice([0.0, 0.0, 0.01, 0.2, 1.0]))),
        "repetition_penalty": 1.0
        if ties
        else float(np.float32(rng.choice([1.0, 1.0, 1.3, 0.8, 3.0]))),
        "tokens": rng.integers(0, vocab, size=int(rng.integers(1, 12))).tolist(),
        # JSON has no infinity: null is -inf.
        "logits": [None if np.isneginf(x) else float(x) for x in logits],
    }
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])]
        if case["repetition_penalty"] != 1.0
        else []
    )
    processors.append(TemperatureLogitsWarper(case["temperature"]))
    if case["top_k"] > 0:
        processors.append(TopKLogitsWarper(case["top_k"]))
    if case["top_p"] < 1.0:
        processors.append(TopPLogitsWarper(case["top_p"]))
    if case["min_p"] > 0.0:
        processors.append(MinPLogitsWarper(case["min_p"]))
    scores = processors(torch.tensor([case["tokens"]]), torch.tensor(logits)[None])[0].numpy()
    kept = np.flatnonzero(np.isfinite(scores))
    case["kept"] = kept.tolist()
    case["probabilities"] = torch.tensor(scores[kept]).softmax(-1).tolist()
    return case


def main() -> None:
    """Record all cases and write the file."""
    rng = np.random.default_rng(SEED)
    reference = {
        "recorded_with": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "seed": SEED,
        },
        "cases": [record_case(rng) for _ in range(NUM_CASES)],
    }
    OUTPUT.write_text(json.dumps(reference, separators=(",", ":")) + "\n")
    print(f"{len(reference['cases'])} cases, {OUTPUT.stat().st_size} bytes -> {OUTPUT}")


if __name__ == "__main__":
    main()
