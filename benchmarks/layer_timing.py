"""How layer calls are timed: on a GPU by events and in CUDA graphs, on the CPU by the clock."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
Step = Callable[[], object]


def default_device() -> torch.device:
    """Give the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_once(run: Step, device: torch.device, *, behind: bool = False) -> float:
    """Time one run in seconds; on a GPU, if `behind` another one, which hides the host's part."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if behind:
        run()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def alternating_seconds(
    runs: Sequence[Step], device: torch.device, rounds: int, *, behind: bool = False
) -> list[list[float]]:
    """Time each run in several rounds, in turns, after two rounds that warm up."""
    for run in [*runs, *runs]:
        run()
    times = [[time_once(run, device, behind=behind) for run in runs] for _ in range(rounds)]
    return [list(times_of_run) for times_of_run in zip(*times, strict=True)]


def all_of(steps: Sequence[Step]) -> Step:
    """Make one step of all, one after the other."""

    def run() -> None:
        for step in steps:
            step()

    return run


def eager_seconds(steps: Sequence[Step], device: torch.device, rounds: int) -> float:
    """Time a step: the median of rounds over all steps, divided by their number.

    Steps with weights of their own leave nothing of each other in the cache.
    """
    (times,) = alternating_seconds([all_of(steps)], device, rounds)
    return statistics.median(times) / len(steps)


def capture(steps: Sequence[Step]) -> torch.cuda.CUDAGraph:
    """Capture all steps, one after the other, in one CUDA graph."""
    run = all_of(steps)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph_seconds(steps: Sequence[Step], device: torch.device, rounds: int) -> float | None:
    """Time a step within a CUDA graph of all; nothing on the CPU."""
    if device.type != "cuda":
        return None
    (times,) = alternating_seconds([capture(steps).replay], device, rounds, behind=True)
    return statistics.median(times) / len(steps)


def read_ceiling(device: torch.device) -> float:
    """Measure bytes per second of the best of several sums over much memory.

    A reduction comes close to what memory can give. Pass a measured ceiling where there is one
    (benchmarks/cuda/decode_time prints it).
    """
    elements = (1 << 30) if device.type == "cuda" else (1 << 26)
    values = torch.zeros(elements, dtype=torch.float32, device=device)
    values.sum()
    best = min(time_once(values.sum, device) for _ in range(10))
    return values.numel() * values.element_size() / best


def output_of(*command: str) -> str:
    """Run a command and give what it prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Describe how layer calls were measured: the arguments of add_layer_arguments()."""
    return {
        "machine": machine(args.device),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "mode": "CUDA graph" if args.device.type == "cuda" else "eager",
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what was measured on, and with what."""
    info = {
        "date": datetime.date.today().isoformat(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return info | {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "driver": output_of(*query).splitlines()[:1],
            "cuda": torch.version.cuda,
        }
    return info | {"device": f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table with columns as wide as they must be."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def microseconds(seconds: float | None) -> str:
    """Write a time for a table."""
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def add_layer_arguments(
    parser: argparse.ArgumentParser, *, rounds: int, layers: int | None = None
) -> None:
    """Add what all programs ask for that time layers.

    Args:
        parser: Takes the arguments.
        rounds: Default of --rounds.
        layers: Default of --layers; None: as many as keep a GPU's cache cold, two on the CPU.
    """
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--rounds", type=int, default=rounds, help="over all layers")
    if layers is None:
        layers = 32 if default_device().type == "cuda" else 2
    parser.add_argument(
        "--layers",
        type=int,
        default=layers,
        help="sets of weights, so that none is found in the cache",
    )


def add_result_arguments(parser: argparse.ArgumentParser, contexts: Sequence[int]) -> None:
    """Add what programs ask for that write a result file."""
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts)
    parser.add_argument(
        "--ceiling",
        type=float,
        help="bytes per second that memory gives at best, as benchmarks/cuda/decode_time measures "
        "it; else a sum by torch is timed",
    )
    add_output_argument(parser)


def ceiling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Give the read ceiling and who has measured it."""
    return {
        "bytes_per_second": args.ceiling or read_ceiling(args.device),
        "measured_by": "given" if args.ceiling else "torch.sum",
    }


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Let a file for the results be given."""
    parser.add_argument("--output", type=Path, help="of the JSON; else it goes to stdout")


def write_result(result: dict[str, Any], output: Path | None) -> None:
    """Write the results as JSON."""
    text = json.dumps(result, indent=2) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
