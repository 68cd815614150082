"""Whole decoder layers of Pythia's sizes on a GPU beside PyTorch: numbers, CUDA graphs, streams.

Skipped without a GPU; with CLUSTERFUSION_TEST_DEVICE=cuda that is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import clusterfusion
import pytest
from clusterfusion import ops
from conftest import ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
if os.environ.get("CLUSTERFUSION_TEST_DEVICE") != "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU to test on", allow_module_level=True)
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

import layer_timing as timing  # noqa: E402
import torch_layer  # noqa: E402
from torch_layer import MODELS, Tensors, relative_error  # noqa: E402

CONTEXTS = (0, 1, 63, 64, 65, 1000, 2047)
MAX_SEQ_LEN = 2048
CASES = torch_layer.tested_layers(["pythia_2b8", "pythia_6b9"])
LARGE = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
SMALL = torch_layer.Sizes(128, 512, 4, 8)
Results = tuple[torch.Tensor, ...]
Layer = Callable[[Tensors, Any], Results]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def equal(one: Results, other: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def named(model: str, call: str) -> Any:
    return getattr(clusterfusion, f"{model}_{call}")


def decoder_layer(model: str, split: bool = False) -> Layer:
    function = named(model, "decoder_layer_split" if split else "decoder_layer")
    return lambda tensors, position: function(*tensors.values(), position)


def graph_step(model: str, ctx_id: int) -> Layer:
    def step(t: Tensors, position: Any) -> Results:
        return named(model, "graph_decode_step")(
            ctx_id, t["input"], t["ln_weight"], t["ln_bias"], t["bias_qkv"], t["bias_o"], t["cos"],
            t["sin"], t["k_cache"], t["v_cache"], t["post_ln_weight"], t["post_ln_bias"],
            t["mlp_up_bias"], t["mlp_down_bias"], position,
        )  # fmt: skip

    return step


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def layer(request: pytest.FixtureRequest) -> Iterator[tuple[str, Tensors, Tensors]]:
    model, dtype, heavy_tailed = request.param
    tensors = torch_layer.random_tensors(
        MODELS[model], getattr(torch, dtype), "cuda", MAX_SEQ_LEN, heavy_tailed=heavy_tailed
    )
    yield model, tensors, torch_layer.widened(tensors)


@pytest.mark.parametrize("position", CONTEXTS)
def test_error_is_at_most_that_of_torch(layer, position):
    model, tensors, wide = layer
    reference = torch_layer.decoder_layer(wide, MODELS[model], position)
    theirs = torch_layer.decoder_layer(tensors, MODELS[model], position)
    for split in (False, True):
        ours = decoder_layer(model, split)(tensors, position)
        for name, value, peer, expected in zip(
            ("output", "k_new", "v_new"), ours, theirs, reference, strict=True
        ):
            # Where both are one rounding away from float64, a tie may fall either way.
            limit = 1.01 * relative_error(peer, expected)
            assert relative_error(value, expected) <= limit, (name, split)


def test_graph_context_gives_the_bits_of_the_layer(layer):
    model, tensors, _ = layer
    named(model, "create_graph_context")(1, *(tensors[name] for name in LARGE), MAX_SEQ_LEN)
    try:
        step = graph_step(model, 1)
        for position in CONTEXTS:
            expected = decoder_layer(model)(tensors, position)
            assert equal(step(tensors, position), expected)
        where = torch.zeros(1, dtype=torch.int32, device="cuda")
        results: list[Results] = []
        graph = timing.capture([lambda: results.append(step(tensors, where))])
        for position in CONTEXTS:
            where.fill_(position)
            graph.replay()
            assert equal(results[-1], decoder_layer(model)(tensors, position))
    finally:
        named(model, "destroy_graph_context")(1)
    with pytest.raises(KeyError, match=r"ctx_id: expected a context"):
        step(tensors, 1)


@pytest.mark.parametrize("split", [False, True])
def test_one_graph_of_several_layers_serves_every_position(split):
    """Three layers, each with what the one before has left, and replays without a wait between."""
    layers = [
        torch_layer.random_tensors(SMALL, torch.float16, "cuda", MAX_SEQ_LEN, seed)
        for seed in range(3)
    ]
    options = {"num_heads": SMALL.num_heads, "rotary_dim": SMALL.rotary_dim, "split": split}
    start = layers[0]["input"].clone()
    before = [{n: t[n].clone() for n in ("k_cache", "v_cache")} for t in layers]

    def step(position: Any) -> torch.Tensor:
        x = layers[0]["input"]
        for tensors in layers:
            x = ops.decoder_layer(*(tensors | {"input": x}).values(), position, **options)[0]
        return layers[0]["input"].copy_(x)

    def reset() -> None:
        layers[0]["input"].copy_(start)
        for tensors, caches in zip(layers, before, strict=True):
            for name, cache in caches.items():
                tensors[name].copy_(cache)

    steps = 100
    expected = [step(position).clone() for position in range(steps)]
    position = torch.zeros(1, dtype=torch.int32, device="cuda")
    graph = timing.capture([lambda: (step(position), position.add_(1))])
    for _ in range(2):
        reset()
        position.zero_()
        found = []
        for _ in range(steps):
            graph.replay()
            found.append(layers[0]["input"].clone())
        assert equal(tuple(found), tuple(expected))


def test_captured_results_are_the_graphs():
    """A replay writes them again, and no result that was given before or after."""
    tensors = torch_layer.random_tensors(MODELS["pythia_2b8"], torch.float16, "cuda", 80)
    call = decoder_layer("pythia_2b8")
    expected = tuple(result.clone() for result in call(tensors, 64))
    results: list[Results] = []
    before = call(tensors, 64)
    graph = timing.capture([lambda: results.append(call(tensors, 64))])
    after = [call(tensors, 64) for _ in range(40)]
    for given in (before, *after):
        for result in given:
            result.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert equal(results[-1], expected)
    assert all((result == 7).all() for given in (before, *after) for result in given)


def test_runs_on_the_current_stream():
    """What a stream has still to write is there when the call behind it reads."""
    model = "pythia_2b8"
    tensors = torch_layer.random_tensors(MODELS[model], torch.float16, "cuda", 80)
    expected = decoder_layer(model)(tensors, 64)
    late = tensors["input"].clone()
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            tensors["input"].fill_(torch.nan)
            torch.cuda._sleep(2_000_000)
            tensors["input"].copy_(late)
            results = decoder_layer(model)(tensors, 64)
            copies = tuple(result.clone() for result in results)
        stream.synchronize()
        assert equal(copies, expected)


def test_streams_and_threads_at_once():
    model = "pythia_2b8"
    layers = [
        torch_layer.random_tensors(MODELS[model], torch.float16, "cuda", 130, seed)
        for seed in range(2)
    ]
    calls = [decoder_layer(model), decoder_layer(model, split=True)]
    expected = [[call(t, 128) for call in calls] for t in layers]
    torch.cuda.synchronize()

    def run(tensors: Tensors) -> list[list[Results]]:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results = [[call(tensors, 128) for call in calls] for _ in range(100)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(len(layers)) as pool:
        for found, one in zip(pool.map(run, layers), expected, strict=True):
            assert all(equal(f, e) for pair in found for f, e in zip(pair, one, strict=True))


def test_allocates_only_results():
    model = "pythia_2b8"
    tensors = torch_layer.random_tensors(MODELS[model], torch.float16, "cuda", 80)
    call = decoder_layer(model)
    call(tensors, 64)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = [call(tensors, 64) for _ in range(50)]
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after - before == sum(map(len, results))


def test_a_position_outside_gives_nan():
    model = "pythia_2b8"
    tensors = torch_layer.random_tensors(MODELS[model], torch.float16, "cuda", 80)
    before = {name: tensors[name].clone() for name in ("k_cache", "v_cache")}
    for position in (-1, 80):
        where = torch.tensor([position], dtype=torch.int32, device="cuda")
        for split in (False, True):
            for result in decoder_layer(model, split)(tensors, where):
                assert result.isnan().all()
        assert all(torch.equal(tensors[name], cache) for name, cache in before.items())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    """A compiled step of a full layer, also where torch makes CUDA graphs of what it may."""
    model = "pythia_2b8"
    tensors = torch_layer.random_tensors(MODELS[model], torch.float16, "cuda", 80)

    def step(t: Tensors, position: Any) -> torch.Tensor:
        return torch.relu(decoder_layer(model)(t, position)[0])

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    where = torch.zeros(1, dtype=torch.int32, device="cuda")
    for value in (3, 4, 70, 5):
        where.fill_(value)
        expected = step(tensors, value)
        assert torch.equal(compiled(tensors, where), expected)
        assert torch.equal(compiled(tensors, where), expected)
