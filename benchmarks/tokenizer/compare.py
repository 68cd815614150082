"""Encode WikiText-2 with this project's tokenizer and with Hugging Face tokenizers, side by side.

Both run on one thread, in the same run, in turns, on the same texts held in memory; each repeat
encodes everything once. Ours is timed inside tokenizer_tool, tokenizers inside this process, so
that neither figure holds the starting of a process or pipes. Times are CPU times of the process:
what a clock on the wall shows on a quiet machine. The ids are compared first.

    python benchmarks/tokenizer/compare.py --build build/release \
        --json benchmarks/results/tokenizer.json
"""

import argparse
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import tokenizers

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TOOL = Path("bin/tokenizer_tool")


def pack(texts: list[bytes]) -> bytes:
    """The texts as tokenizer_tool reads them."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def run_tool(tool: Path, arguments: list[str], texts: list[bytes]) -> bytes:
    """The standard output of tokenizer_tool."""
    command = [str(tool), *arguments]
    return subprocess.run(command, input=pack(texts), stdout=subprocess.PIPE, check=True).stdout


def our_ids(tool: Path, path: Path, texts: list[bytes]) -> list[list[int]]:
    """The ids of every text."""
    output = run_tool(tool, [str(path), "encode"], texts)
    ids, position = [], 0
    while position < len(output):
        (length,) = struct.unpack_from("<I", output, position)
        ids.append(list(struct.unpack_from(f"<{length}i", output, position + 4)))
        position += 4 + 4 * length
    return ids


def our_seconds(tool: Path, path: Path, texts: list[bytes], passes: int) -> list[float]:
    """How long each of the passes over the texts takes."""
    output = run_tool(tool, [str(path), "time", str(passes)], texts)
    return list(struct.unpack(f"<{passes}d", output[4:]))


def their_seconds(reference: tokenizers.Tokenizer, texts: list[str]) -> float:
    """How long encoding all texts takes, by the faster of tokenizers' two ways to do it."""
    seconds = []
    for encode in (
        lambda: [reference.encode(text) for text in texts],
        lambda: reference.encode_batch_fast(texts),
    ):
        start = time.process_time()
        encode()
        seconds.append(time.process_time() - start)
    return min(seconds)


def summary(seconds: list[float], size: int) -> dict:
    """Median and spread, in seconds and in MB/s."""
    median = statistics.median(seconds)
    return {
        "median_cpu_s": median,
        "min_cpu_s": min(seconds),
        "max_cpu_s": max(seconds),
        "median_mb_per_s": size / median / 1e6,
        "repeats": len(seconds),
    }


def compare(
    tool: Path, path: Path, texts: list[bytes], repeats: int, name: str
) -> dict[str, object]:
    """Times both on the same texts, in turns."""
    decoded = [text.decode("utf-8") for text in texts]
    reference = tokenizers.Tokenizer.from_file(str(path))
    if our_ids(tool, path, texts) != [reference.encode(text).ids for text in decoded]:
        sys.exit(f"{name}: the ids differ; run tests/python/test_tokenizer.py")
    size = sum(map(len, texts))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        theirs.append(their_seconds(reference, decoded))
        ours.append(min(our_seconds(tool, path, texts, 2)))
    result = {
        "name": name,
        "texts": len(texts),
        "bytes": size,
        "clusterfusion": summary(ours, size),
        "tokenizers": summary(theirs, size),
        "ratio_of_medians": statistics.median(theirs) / statistics.median(ours),
        "smallest_ratio": min(theirs) / max(ours),
    }
    print(
        f"{name}: {result['clusterfusion']['median_mb_per_s']:.1f} MB/s, tokenizers "
        f"{result['tokenizers']['median_mb_per_s']:.2f} MB/s: {result['ratio_of_medians']:.1f} x",
        file=sys.stderr,
    )
    return result


def output_of(command: list[str]) -> str:
    """What a command prints, stripped."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, object]:
    """What the figures depend on."""
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "commit": output_of(["git", "rev-parse", "HEAD"]),
        "uncommitted_changes": bool(output_of(["git", "status", "--porcelain", "src/tokenizer"])),
        "command": "python " + " ".join([str(Path(sys.argv[0])), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Times WikiText-2 as whole files and line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--build", type=Path, required=True, help="a build folder with the tests")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt-neox-20b-tokenizer.json")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()

    before = machine()
    files = [(DATA / f"wikitext-2-{part}.txt").read_bytes() for part in ("valid", "test")]
    lines = [line for text in files for line in text.splitlines(keepends=True)]
    tool = arguments.build.resolve() / TOOL
    result = {
        "benchmark": "tokenizer: encoding WikiText-2 (valid and test) on one thread",
        "tokenizer": arguments.tokenizer.name,
        "machine": before,
        "cases": [
            compare(tool, arguments.tokenizer, files, arguments.repeats, "whole files"),
            compare(tool, arguments.tokenizer, lines, arguments.repeats, "line by line"),
        ],
    }
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
