"""Logits of a Pythia-sized model with random weights on a GPU against transformers in float32.

The yardstick is transformers in float16 on the same GPU: our error must be no larger, at any
context, after a prefill, after decode steps, and after a decode step behind a prefill.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import PYTHIA_SHAPES, transformers_config
from reference_model import relative_error

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = os.environ.get("CLUSTERFUSION_TEST_SHAPE", "pythia-2.8b")
CONTEXTS = [1, 2, 63, 64, 65, 500, 1000, 2047]
LONGEST_DECODED = 65  # contexts up to this one are reached by decode steps alone as well


@dataclass(frozen=True)
class Sample:
    """A checkpoint, a text, and what transformers makes of them."""

    folder: Path
    tokens: np.ndarray
    exact: dict[int, np.ndarray]  # float32 logits after so many tokens
    float16: dict[int, np.ndarray]


@pytest.fixture(scope="module")
def torch_device(gpu) -> str:
    if gpu == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch cannot use the GPU")
    return gpu


def make_model(device: str) -> transformers.GPTNeoXForCausalLM:
    """Float32 weights that float16 can write; scales as in checkpoints.py.

    The residual stream keeps near unit size, attention is neither flat nor one-hot, and the logits
    are a few units wide.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment says
    with torch.device(device):
        model = transformers.GPTNeoXForCausalLM(transformers_config(SHAPE)).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = distribution_of(name, tuple(parameter.shape))
            parameter.normal_(mean, std).copy_(parameter.half())
    return model


def distribution_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    module, kind = name.split(".")[-2:]
    if "norm" in module:
        return (1.0, 0.2) if kind == "weight" else (0.0, 0.1)
    if kind == "bias":
        return 0.0, 0.2
    if module == "embed_in":
        return 0.0, 0.5
    gains = {"query_key_value": 1.2, "dense_4h_to_h": 0.7, "lm_head": 2.5, "embed_out": 2.5}
    return 0.0, gains.get(module, 1.0) / np.sqrt(shape[1])


def to_float16(model: transformers.GPTNeoXForCausalLM) -> None:
    """As from_pretrained(dtype=float16) has it: the rotary frequencies stay in float32."""
    rotary = model.gpt_neox.rotary_emb
    frequencies = rotary.inv_freq.clone()
    model.half()
    rotary.inv_freq = frequencies


def logits_of(model: transformers.GPTNeoXForCausalLM, tokens: np.ndarray) -> dict[int, np.ndarray]:
    ids = torch.tensor(tokens[None].astype(np.int64), device=model.device)
    places = torch.tensor(CONTEXTS, device=model.device) - 1
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=places).logits[0].float().cpu().numpy()
    return dict(zip(CONTEXTS, logits, strict=True))


@pytest.fixture(scope="module")
def sample(torch_device, tmp_path_factory) -> Iterator[Sample]:
    """In shared memory if it has room, because the weights of 2.8B fill 5.5 GB."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 8 << 30
    folder = (shared if roomy else tmp_path_factory.mktemp("checkpoint")) / f"cf-{os.getpid()}"
    folder.mkdir()
    vocab = PYTHIA_SHAPES[SHAPE][4]
    tokens = (np.random.PCG64(3).random_raw(max(CONTEXTS)) % vocab).astype(np.int32)
    try:
        model = make_model(torch_device)
        exact = logits_of(model, tokens)
        to_float16(model)
        model.save_pretrained(folder)
        float16 = logits_of(model, tokens)
        del model
        if torch_device == "cuda":
            torch.cuda.empty_cache()
        tokens.tofile(folder / "tokens")
        yield Sample(folder, tokens, exact, float16)
    finally:
        shutil.rmtree(folder)


def decode_logits(build_dir: Path, sample: Sample, lengths: list[str]) -> list[np.ndarray]:
    """What the engine's GPU backend computes for each PREFILL+DECODE (tests/gpu/decode_logits)."""
    out = sample.folder / "logits"
    command = [build_dir / "bin" / "decode_logits", sample.folder, sample.folder / "tokens", out]
    done = subprocess.run([*command, *lengths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(np.fromfile(out, np.float32).reshape(len(lengths), -1))


def test_logits(build_dir, sample):
    ways = {f"{context - 1}+1": context for context in CONTEXTS}
    ways |= {f"0+{context}": context for context in CONTEXTS if context <= LONGEST_DECODED}
    ways |= {f"{context}+0": context for context in CONTEXTS}
    found = decode_logits(build_dir, sample, list(ways))
    worse = []
    print(f"{SHAPE}: relative error of the logits against transformers in float32")
    for (way, context), logits in zip(ways.items(), found, strict=True):
        exact = sample.exact[context]
        ours = relative_error(logits, exact)
        theirs = relative_error(sample.float16[context], exact)
        best = logits.argmax() == exact.argmax()
        print(
            f"prefill+decode {way:>7}: ours {ours:.2e}, transformers in float16 {theirs:.2e}, "
            f"likeliest token {'the same' if best else 'another'}"
        )
        if not ours <= theirs:
            worse.append(way)
    assert worse == []


def test_prefill_and_decode_agree(build_dir, sample):
    """Read token by token, a text gives the logits of its prefill, within float16's error."""
    length = 200
    prefilled, decoded = decode_logits(build_dir, sample, [f"{length}+0", f"0+{length}"])
    assert relative_error(decoded, prefilled) < 5e-3
