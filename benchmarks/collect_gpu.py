#!/usr/bin/env python3
"""Join what the GPU programs printed into one file of benchmarks/results.

collect_gpu.py --models decode_time.json [--rivals torch_cuda.json] --driver 580.1 --commit abc
               --command "..." [--remark "..."] --output benchmarks/results/gpu_h100.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from gpu_results import COMPARED


def read(path: str) -> Any:
    """A JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def check_context(row: dict[str, Any], where: str, keys: tuple[str, ...]) -> None:
    """Exit if a measurement lacks a figure, or its figures cannot be."""
    missing = [key for key in keys if not isinstance(row.get(key), int | float)]
    if missing:
        sys.exit(f"collect_gpu: {where}: expected numbers {', '.join(missing)}, found {row}")
    if not 0 < row["low"] <= row["ms_per_token"] <= row["high"]:
        sys.exit(f"collect_gpu: {where}: expected 0 < low <= ms_per_token <= high, found {row}")


def collect(
    models: list[dict[str, Any]], rivals: dict[str, Any], about: dict[str, str]
) -> dict[str, Any]:
    """The result file's content."""
    times = ("context", "ms_per_token", "low", "high")
    for model in models:
        for row in model["contexts"]:
            check_context(row, model["model"], (*times, "ceiling_share"))
    for rival in rivals.get("rivals", []):
        for row in rival["contexts"]:
            check_context(row, rival["name"], times)
    if rivals.get("shape", COMPARED) != COMPARED:
        sys.exit(f"collect_gpu: rivals were measured on {rivals['shape']}, not on {COMPARED}")
    devices = {model["device"] for model in models}
    if len(devices) != 1:
        sys.exit(f"collect_gpu: expected models from one device, found {sorted(devices)}")
    return {
        "what": "time a token of the whole decode step from the host, random float16 weights in "
        "Pythia's shapes, batch 1, greedy; medians with smallest and largest",
        "device": devices.pop(),
        **about,
        "models": models,
        "rivals_model": COMPARED,
        "rivals": rivals.get("rivals", []),
        "torch": rivals.get("torch"),
        "transformers": rivals.get("transformers"),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="what decode_time printed")
    parser.add_argument("--rivals", help="what peers/torch_cuda.py printed")
    parser.add_argument("--driver", required=True, help="nvidia-smi's driver_version")
    parser.add_argument("--commit", required=True, help="that was measured")
    parser.add_argument("--command", required=True, help="that measured")
    parser.add_argument("--remark", help="a sentence for readers of the table")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    about = {
        "driver": arguments.driver,
        "commit": arguments.commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": arguments.command,
    }
    if arguments.remark:
        about["remark"] = arguments.remark
    rivals = read(arguments.rivals) if arguments.rivals else {}
    content = json.dumps(collect(read(arguments.models), rivals, about), indent=2)
    Path(arguments.output).write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
