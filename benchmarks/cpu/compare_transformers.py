"""Compare decode and prefill on the CPU with transformers, on one random Pythia-shaped checkpoint.

Makes the checkpoint outside the repository if it is not there, runs both sides in turns so that
whatever else the machine does meets both, and writes one JSON file with machine, versions, commit,
medians, spreads and ratios. Needs torch and transformers (they are not needed to build or test).

    python benchmarks/cpu/compare_transformers.py --program build/release/bin/decode_bandwidth
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / "benchmarks/peers/transformers_cpu.py"
# What the measured program is made of.
MEASURED = ["src/backend", "src/base", "src/sampling", "benchmarks/cpu"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, required=True, help="the built decode_bandwidth")
    parser.add_argument("--shape", default="pythia-410m", help="a shape of the Pythia suite")
    parser.add_argument("--folder", type=Path, help="of the checkpoint; made if it is not there")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--steps", type=int, default=16, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--python", default=sys.executable, help="one that has transformers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu_410m.json")
    return parser.parse_args()


def run_json(command: list[str]) -> dict:
    """Run a program and read the JSON that it prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def make_checkpoint(folder: Path, shape: str, python: str) -> None:
    """Write the random fp16 checkpoint unless it is there."""
    if (folder / "config.json").exists():
        return
    script = ROOT / "tests/python/checkpoints.py"
    command = [python, str(script), "--shape", shape, "--dtype", "float16", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {
        "median": statistics.median(values),
        "smallest": min(values),
        "largest": max(values),
        "count": len(values),
    }


def cpu_name() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Commit that was measured, marked if the tree had changes in the measured code."""
    show = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    dirty = ["git", "-C", str(ROOT), "status", "--porcelain", *MEASURED]
    changed = subprocess.run(dirty, capture_output=True, text=True, check=True).stdout.strip()
    head = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    return head + ("+changes" if changed else "")


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Take turns, and gather what each round found."""
    ours = [str(arguments.program), "--model", str(folder), "--rounds", "2"]
    ours += ["--steps", str(arguments.steps), "--prompt", str(arguments.prompt)]
    theirs = [arguments.python, str(PEER), str(folder), "--steps", str(arguments.steps)]
    found: dict[str, list[float]] = {}
    peer: dict = {}
    device = ""

    def keep(name: str, values: list[float]) -> None:
        found.setdefault(name, []).extend(values)

    for turn in range(arguments.rounds):
        print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr)
        own = run_json(ours)
        device = own["device"]
        keep("decode_seconds", [own["decode_seconds"]["median"]])
        keep("prefill_seconds", [own["prefill_seconds"]["median"]])
        keep("plain_read_bytes_per_second", [own["plain_read_bytes_per_second"]["median"]])
        keep("read_ceiling_bytes_per_second", [own["read_ceiling_bytes_per_second"]["median"]])
        keep("decode_share_of_plain_read", [own["decode_share_of_plain_read"]["median"]])
        keep("decode_share_of_read_ceiling", [own["decode_share_of_read_ceiling"]["median"]])
        prompt = ["--prompt", str(arguments.prompt), "--repeats", "2"]
        peer = run_json([*theirs, "--dtype", "float32", *prompt])
        keep("transformers_float32_decode_seconds", [statistics.median(peer["decode_seconds"])])
        keep("transformers_float32_prefill_seconds", peer["prefill_seconds"])
        peer = run_json([*theirs, "--dtype", "bfloat16"])
        keep("transformers_bfloat16_decode_seconds", [statistics.median(peer["decode_seconds"])])
    versions = {key: peer[key] for key in ("torch", "transformers", "threads", "attention")}
    return {"device": device, "peer": versions, "measured": found}


def main() -> None:
    """Measure and write the result."""
    arguments = parse_arguments()
    folder = arguments.folder or Path(tempfile.gettempdir()) / f"random-{arguments.shape}-float16"
    make_checkpoint(folder, arguments.shape, arguments.python)
    load_before = os.getloadavg()[0]
    result = measure(arguments, folder)
    measured = {name: spread(values) for name, values in result["measured"].items()}
    middle = {name: value["median"] for name, value in measured.items()}
    best_decode = min(
        middle["transformers_float32_decode_seconds"],
        middle["transformers_bfloat16_decode_seconds"],
    )
    report = {
        "what": f"random {arguments.shape}-shaped float16 checkpoint, batch 1, context 16, "
        f"prefill of {arguments.prompt} tokens with logits at the last position",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": "python benchmarks/cpu/compare_transformers.py --program "
        f"{arguments.program.name} --shape {arguments.shape} --prompt {arguments.prompt} "
        f"--steps {arguments.steps} --rounds {arguments.rounds}",
        "machine": {
            "processor": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load_before": load_before,
            "backend": result["device"],
        },
        "transformers": result["peer"],
        "measured": measured,
        "ratios": {
            "decode_speed_over_transformers_best": best_decode / middle["decode_seconds"],
            "prefill_speed_over_transformers_float32": middle[
                "transformers_float32_prefill_seconds"
            ]
            / middle["prefill_seconds"],
            "decode_share_of_plain_read": middle["decode_share_of_plain_read"],
            "decode_share_of_read_ceiling": middle["decode_share_of_read_ceiling"],
        },
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    main()
