"""docs/a-researchers-day.md: its files are written and its commands run, one after the other.

The demo model stands for the last checkpoint, and noisy copies of it for the ones before, on the
tests' own hub.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import clusterfusion
import numpy as np
import pytest
from conftest import ROOT
from hub_server import HubModel, running_hub

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save
from test_hub import HF, PROGRAM, Client, needs_hf, needs_program, read_files

PAGE = ROOT / "docs" / "a-researchers-day.md"
NAME = "EleutherAI/pythia-14m"
NOISE = {"step1000": 1.0, "step10000": 0.2, "step143000": 0.0}


class Block(NamedTuple):
    language: str
    needs: str  # a Python package without which the block is left out
    text: str


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [Block(*block) for block in found if block[0] != "text"]


def noisy(files: dict[str, bytes], folder: Path, share: float) -> dict[str, bytes]:
    """The same checkpoint with noise added to its matrices, in shares of their own spread."""
    random = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            noise = random.standard_normal(tensor.shape) * (share * tensor.astype(float).std())
            tensors[name] = (tensor + noise).astype(tensor.dtype)
    return files | {"model.safetensors": save(tensors, {"format": "pt"})}


@pytest.fixture(scope="module")
def client(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("day")
    files = read_files(demo_model)
    with running_hub() as hub:
        hub.models[NAME] = HubModel()
        for revision, share in NOISE.items():
            hub.models[NAME].add(revision, noisy(files, demo_model, share) if share else files)
        engine = clusterfusion.Engine(demo_model, device="cpu")
        text = engine.generate(
            "The old house", max_new_tokens=600, temperature=0.7, ignore_eos=True
        )
        (folder / "novel.txt").write_text(text.text, encoding="utf-8")
        yield Client(hub, folder)


def programs_of(client: Client) -> Path:
    """A folder with what the page calls by name."""
    folder = client.folder / "bin"
    for name, path in (("clusterfusion", PROGRAM), ("python", sys.executable), ("hf", HF)):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(str(path))} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def run_block(client: Client, block: Block) -> str:
    """Writes a file that names itself in its first line, or runs commands."""
    if block.language != "sh":
        path = client.folder / re.match(r"# ([\w./]+)", block.text)[1]
        path.parent.mkdir(exist_ok=True)
        has_comments = path.suffix != ".jsonl"
        path.write_text(block.text if has_comments else block.text.partition("\n")[2])
        return ""
    ended = client.run(
        ["bash", "-euc", block.text],
        PATH=os.pathsep.join([str(programs_of(client)), os.environ["PATH"]]),
        HF_DATASETS_CACHE=str(client.folder / "datasets"),
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@needs_program
@needs_hf
def test_the_day(client):
    said, left_out = "", []
    for block in blocks():
        if block.needs and importlib.util.find_spec(block.needs) is None:
            left_out.append(block.needs)
            continue
        said += run_block(client, block)
    rows = json.loads((client.folder / "revisions.json").read_text())
    assert [f"step{row['step']}" for row in rows] == list(NOISE)
    bits = [row["bits_per_byte"] for row in rows]
    assert bits == sorted(bits, reverse=True) and bits[0] > 1.5 * bits[-1]
    assert rows[-1]["advantage"] > 0
    (by_program,) = re.findall(r'^{.*"bits_per_byte": ?([\d.]+)', said, re.MULTILINE)
    assert float(by_program) == pytest.approx(bits[-1], rel=1e-6)
    cosines = [float(value) for value in re.findall(r"^layer \d+: (-?[\d.]+)$", said, re.MULTILINE)]
    assert len(cosines) > 1 and cosines[-1] == 1 and cosines[0] < cosines[-1]
    if "lm_eval" not in left_out:
        (file,) = (client.folder / "results" / "step143000").rglob("results_*.json")
        assert "acc,none" in json.loads(file.read_text())["results"]["night"]
    if "matplotlib" not in left_out:
        assert (client.folder / "revisions.png").read_bytes().startswith(b"\x89PNG")
    if left_out:
        pytest.skip(f"all but what needs {' and '.join(left_out)} was run")
