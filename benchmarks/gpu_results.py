"""The GPU's result files, as benchmarks/collect_gpu.py writes and plot and README read them.

docs/testing.md says what is in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# The model that rivals are compared on.
COMPARED = "pythia-2.8b"
CHIPS = {"gpu_h100.json": "H100", "gpu_h200.json": "H200"}

Result = dict[str, Any]


def load_results(folder: Path = RESULTS) -> dict[str, Result]:
    """The results that there are, by the chip's name."""
    return {
        chip: json.loads((folder / name).read_text(encoding="utf-8"))
        for name, chip in CHIPS.items()
        if (folder / name).exists()
    }


def load_if_there(path: Path) -> Result | None:
    """A result, or the record of a rival's."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load_rows(folder: Path = RESULTS) -> tuple[Result, Result | None] | None:
    """What rows_time measured of steps of several sequences, and the rival's record."""
    ours = load_if_there(folder / "rows_h200.json")
    return None if ours is None else (ours, load_if_there(folder / "rows_vllm_h200.json"))


def load_serving(folder: Path = RESULTS) -> tuple[Result, Result | None] | None:
    """What serve_latency.py measured on a GPU, and the rival's record of the same requests."""
    ours = load_if_there(folder / "serving_latency_h200.json")
    rival = load_if_there(folder / "serving_vllm_h200.json")
    if ours is None:
        return None
    alike = ("model", "prompt_tokens", "new_tokens")
    is_same = rival is not None and all(ours[name] == rival[name] for name in alike)
    return ours, rival if is_same else None


def serving_pictures() -> dict[str, tuple[str, str]]:
    """Files of docs/images with the server's times, and their titles, by what is measured."""
    return {
        "per_token_ms": ("serving_per_token_h200.svg", "milliseconds a token of each stream"),
        "first_token_ms": ("serving_first_token_h200.svg", "milliseconds to the first token"),
    }


def contexts_of(result: Result, model: str = COMPARED) -> list[dict[str, float]]:
    """Measurements of one of our models by context; none if it was not measured."""
    for measured in result["models"]:
        if measured["model"] == model:
            return sorted(measured["contexts"], key=lambda row: row["context"])
    return []


def decode_time_picture(chip: str) -> str:
    """The file of docs/images in which time a token is drawn against the context."""
    return f"decode_time_{chip.lower()}.svg"


def floor_of(row: dict[str, float]) -> float:
    """Milliseconds that reading what the step reads takes at the ceiling's speed."""
    return row["ms_per_token"] * row["ceiling_share"]


def short_contexts(result: Result) -> list[tuple[str, dict[str, float]]]:
    """For each model its measurement at the context next to 128, which hardly counts beside it."""
    return [
        (measured["model"], min(measured["contexts"], key=lambda row: abs(row["context"] - 128)))
        for measured in result["models"]
    ]
