"""pytorch_model.bin instead of model.safetensors: the same model, bit for bit.

The files are written without torch (checkpoints.py). Where torch is installed, files that torch
writes are read too, and torch reads ours.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import Tensor, write_random_checkpoint, write_torch_file
from reference_model import read_safetensors

TOKENS = [(7 * i) % 300 for i in range(40)]


def logits_of(folder: Path) -> np.ndarray:
    return clusterfusion.Engine(folder, device="cpu", threads=1).logits(TOKENS)


@pytest.mark.parametrize(
    "setting",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16", "shards": 3},
        {"dtype": "float32", "tied": True, "attention_bias": False},
        {"dtype": "float16", "vector_dtype": "float32", "with_buffers": True},
        {"dtype": "float16", "shards": 5, "prefix": False, "with_buffers": True},
    ],
    ids=str,
)
def test_same_logits_as_from_safetensors(tmp_path, setting):
    expected = write_random_checkpoint(tmp_path / "safetensors", **setting)
    folder = write_random_checkpoint(tmp_path / "torch", **setting, weights="torch")
    assert not list(folder.glob("*.safetensors"))
    np.testing.assert_array_equal(logits_of(folder), logits_of(expected))


def test_safetensors_win(tmp_path):
    folder = write_random_checkpoint(tmp_path / "both", seed=1)
    other = write_random_checkpoint(tmp_path / "other", seed=2, weights="torch")
    shutil.copy(other / "pytorch_model.bin", folder)
    expected = logits_of(write_random_checkpoint(tmp_path / "one", seed=1))
    np.testing.assert_array_equal(logits_of(folder), expected)


def copy_demo_model(demo_model: Path, folder: Path) -> Path:
    """The demo model without its weights."""
    shutil.copytree(demo_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_demo_model_writes_the_same_text(demo_model, tmp_path):
    folder = copy_demo_model(demo_model, tmp_path / "demo")
    weights = read_safetensors(demo_model / "model.safetensors")
    tensors = [
        Tensor(name, "F16", value.shape, lambda value=value: iter([value.astype(np.float16)]))
        for name, value in weights.items()
    ]
    write_torch_file(folder / "pytorch_model.bin", tensors)
    texts = [
        clusterfusion.Engine(path, device="cpu")
        .generate("It was a dark", max_new_tokens=60, temperature=0.8, seed=5)
        .text
        for path in (folder, demo_model)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 60


# Beside torch.


def run_command_of(message: str, folder: Path) -> None:
    """Runs the command that a message ends with, as a user would in a shell."""
    command = re.search(r'python (-c ".*")', message).group(1)
    ended = subprocess.run(
        f"{sys.executable} {command}", shell=True, cwd=folder, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_torch_reads_what_the_tests_write(tmp_path):
    torch = pytest.importorskip("torch")
    setting = {"dtype": "float16", "vector_dtype": "float32", "with_buffers": True}
    folder = write_random_checkpoint(tmp_path, **setting, weights="torch")
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)
    written = write_random_checkpoint(tmp_path / "safetensors", **setting)
    expected = read_safetensors(written / "model.safetensors")
    assert loaded.keys() >= expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)
    mask = loaded["gpt_neox.layers.0.attention.bias"]
    assert mask.dtype == torch.bool
    assert mask.sum() == 256 * 257 / 2


@pytest.fixture
def saved(demo_model, tmp_path):
    """A function that saves the demo model's state dict by torch.save."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder = copy_demo_model(demo_model, tmp_path / "demo")

    def save(change=lambda tensors: tensors, **options) -> Path:
        tensors = change(load_file(demo_model / "model.safetensors"))
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return folder

    return save


def test_what_torch_saves(saved, demo_model):
    np.testing.assert_array_equal(logits_of(saved()), logits_of(demo_model))


def test_parameters_and_views_of_one_storage(saved, demo_model):
    """As tools that gather a sharded model write it: all tensors are parts of one storage."""
    import torch

    def gather(tensors: dict) -> dict:
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        parts = whole.split([tensor.numel() for tensor in tensors.values()])
        pairs = zip(tensors.items(), parts, strict=True)
        return {name: torch.nn.Parameter(part.view(value.shape)) for (name, value), part in pairs}

    np.testing.assert_array_equal(logits_of(saved(gather)), logits_of(demo_model))


def test_the_command_that_converts_old_files(saved, demo_model):
    folder = saved(_use_new_zipfile_serialization=False)
    with pytest.raises(NotImplementedError, match=r"before version 1\.6") as caught:
        clusterfusion.Engine(folder)
    run_command_of(str(caught.value), folder)
    assert [path.name for path in folder.glob("pytorch_model*")] == ["pytorch_model.bin"]
    np.testing.assert_array_equal(logits_of(folder), logits_of(demo_model))


def test_the_command_that_removes_gaps(saved, demo_model):
    def transpose(tensors: dict) -> dict:
        embedding = tensors["gpt_neox.embed_in.weight"]
        return tensors | {"gpt_neox.embed_in.weight": embedding.t().contiguous().t()}

    folder = saved(transpose)
    with pytest.raises(NotImplementedError, match="not contiguous") as caught:
        clusterfusion.Engine(folder)
    run_command_of(str(caught.value), folder)
    os.replace(folder / "NEW.bin", folder / "pytorch_model.bin")
    np.testing.assert_array_equal(logits_of(folder), logits_of(demo_model))
