"""The C functions behind the layer calls on plain torch tensors, beside the other way.

On the CPU, or on the device that CLUSTERFUSION_TEST_DEVICE names.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusterfusion import _layer_calls, ops
from conftest import ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

import torch_layer  # noqa: E402
from clusterfusion import _torch_calls  # noqa: E402
from clusterfusion._layer_calls import LayerCall  # noqa: E402
from clusterfusion.pythia import LayerSizes, layer_calls  # noqa: E402

DEVICE = torch.device(os.environ.get("CLUSTERFUSION_TEST_DEVICE", "cpu"))
SIZES = torch_layer.TINY
NAMES = ("attention_mlp_up", "mlp_down", "decoder_layer")

pytestmark = [
    pytest.mark.skipif(_layer_calls._eager is None, reason="built without the extension"),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        reason="this torch has no DLPack exchange API",
    ),
]


asked = threading.local()


def other_way(*arguments: Any) -> Any:
    """Nothing for ask(), so that it shows what goes this way."""
    return None if getattr(asked, "now", False) else _layer_calls.make_call(*arguments)


def ask(name: str, *arguments: Any) -> Any:
    """What a function of the extension returns by itself."""
    asked.now = True
    try:
        return getattr(_layer_calls._eager, name)(*arguments)
    finally:
        asked.now = False


def eager(call: LayerCall, tensors: Any, settings: Any, out: Any) -> Any:
    """A call's results, or None where it goes the other way."""
    return ask(call.name, *tensors, *settings, out)


def public(call: LayerCall, tensors: Any, settings: Any, out: Any) -> Any:
    return getattr(_layer_calls._eager, call.name)(*tensors, *settings, out)


@pytest.fixture(autouse=True, scope="module")
def watched() -> Any:
    _layer_calls.set_up_eager(other_way)
    yield
    _layer_calls.set_up_eager()


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def arguments(name: str, seed: int = 0) -> tuple[LayerCall, tuple[Any, ...], tuple[Any, ...]]:
    """A call, its tensors and its settings."""
    values = tuple(torch_layer.random_tensors(SIZES, torch.float16, DEVICE, 8, seed).values())
    options = (3, SIZES.num_heads, SIZES.rotary_dim, 1e-5, "gelu")
    if name == "attention_mlp_up":
        return _layer_calls.ATTENTION_MLP_UP, values[:15], (*options, 0, 0)
    if name == "decoder_layer":
        return _layer_calls.DECODER_LAYER, values, (*options, False, 0, 0)
    parts = torch_layer.attention_mlp_up(
        torch_layer.random_tensors(SIZES, torch.float16, DEVICE, 8, seed), SIZES, 3
    )
    return _layer_calls.MLP_DOWN, (values[0], *parts[:2], *values[15:]), (0, 0)


def caches(tensors: tuple[Any, ...]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors[5:7] if isinstance(tensor, torch.Tensor)]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_the_other_way(name, mode):
    call, tensors, settings = arguments(name)
    other = _torch_calls._run_native(call, tensors, settings, None)
    written = caches(tensors)
    call, tensors, settings = arguments(name)
    with mode():
        results = eager(call, tensors, settings, None)
        expected = _torch_calls._run_native(call, tensors, settings, None)
    assert equal(results, other)
    assert equal(caches(tensors), written)
    for result, like in zip(results, expected, strict=True):
        for attribute in ("dtype", "device", "shape", "requires_grad"):
            assert getattr(result, attribute) == getattr(like, attribute)
        assert type(result) is torch.Tensor
        assert result.stride() == like.stride()
        assert result.is_inference() == like.is_inference()


def as_parameters(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors)


@pytest.mark.parametrize(
    "change",
    {
        "parameters": lambda t, s: (as_parameters(t), s),
        "no biases": lambda t, s: (replaced(replaced(t, 2, None), 4, None), s),
        "position [1]": lambda t, s: (
            t,
            replaced(s, 0, torch.tensor([3], dtype=torch.int32, device=DEVICE)),
        ),
        "position []": lambda t, s: (
            t,
            replaced(s, 0, torch.tensor(3, dtype=torch.int32, device=DEVICE)),
        ),
        "input [1, 1, hidden]": lambda t, s: (replaced(t, 0, t[0].view(1, 1, -1)), s),
        "rotary_dim of cos": lambda t, s: (
            (*t[:9], *(table[: SIZES.rotary_dim] for table in t[9:11]), *t[11:]),
            replaced(s, 2, None),
        ),
        "activation": lambda t, s: (t, replaced(s, 4, "relu")),
        "split": lambda t, s: (t, replaced(s, 5, True)),
        "expected sizes": lambda t, s: (t, (*s[:-2], SIZES.hidden, SIZES.intermediate)),
    }.items(),
    ids=lambda item: item[0],
)
def test_usual(change):
    call, tensors, settings = arguments("decoder_layer")
    tensors, settings = change[1](tensors, settings)
    expected = _torch_calls._run_native(call, tensors, settings, None)
    for t in tensors[5:7]:
        t[3] = 0
    results = eager(call, tensors, settings, None)
    assert equal(results, expected)
    assert [r.shape for r in results] == [e.shape for e in expected]


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("name", NAMES)
def test_out(name, kind):
    call, tensors, settings = arguments(name)
    expected = eager(call, tensors, settings, None)
    out = kind(torch.full_like(tensor, torch.nan) for tensor in expected)
    results = eager(call, tensors, settings, out)
    assert type(results) is tuple
    assert all(result is o for result, o in zip(results, out, strict=True))
    assert equal(results, expected)


class Subclass(torch.Tensor):
    pass


# What a call leaves to the other way: changes of the decoder layer's tensors, settings, results.
UNUSUAL: dict[str, Callable[..., tuple[Any, ...]]] = {
    "first is a subclass": lambda t, s, o: (replaced(t, 0, t[0].as_subclass(Subclass)), s, o),
    "first is an array": lambda t, s, o: (replaced(t, 0, np.zeros((1, 2), np.float16)), s, o),
    "first is none": lambda t, s, o: (replaced(t, 0, None), s, o),
    "no tensors": lambda t, s, o: ((), s, o),
    "another is a subclass": lambda t, s, o: (replaced(t, 3, t[3].as_subclass(Subclass)), s, o),
    "no tensor": lambda t, s, o: (replaced(t, 3, 1.0), s, o),
    "a list": lambda t, s, o: (replaced(t, 3, [t[3]]), s, o),
    "an array": lambda t, s, o: (replaced(t, 3, np.zeros((2, 2), np.float16)), s, o),
    "none": lambda t, s, o: (replaced(t, 3, None), s, o),
    "sparse": lambda t, s, o: (replaced(t, 3, t[3].to_sparse()), s, o),
    "meta": lambda t, s, o: (replaced(t, 3, t[3].to("meta")), s, o),
    "dtype": lambda t, s, o: (replaced(t, 3, t[3].float()), s, o),
    "shape": lambda t, s, o: (replaced(t, 3, t[3][:, :32].contiguous()), s, o),
    "strides": lambda t, s, o: (replaced(t, 3, t[3].T), s, o),
    "overlap": lambda t, s, o: (replaced(t, 6, t[5]), s, o),
    "input of four dimensions": lambda t, s, o: (replaced(t, 0, t[0].view(1, 1, 1, -1)), s, None),
    "scalar input": lambda t, s, o: (replaced(t, 0, t[0][0, 0]), s, o),
    "full caches": lambda t, s, o: (t, replaced(s, 0, 8), o),
    "negative position": lambda t, s, o: (t, replaced(s, 0, -1), o),
    "huge position": lambda t, s, o: (t, replaced(s, 0, 1 << 70), o),
    "position is a bool": lambda t, s, o: (t, replaced(s, 0, True), o),
    "position is a float": lambda t, s, o: (t, replaced(s, 0, 3.0), o),
    "position of int64": lambda t, s, o: (t, replaced(s, 0, torch.tensor(3)), o),
    "no heads": lambda t, s, o: (t, replaced(s, 1, 0), o),
    "heads do not divide": lambda t, s, o: (t, replaced(s, 1, 3), o),
    "odd rotary_dim": lambda t, s, o: (t, replaced(s, 2, 3), o),
    "eps is a str": lambda t, s, o: (t, replaced(s, 3, "1"), o),
    "eps is an int": lambda t, s, o: (t, replaced(s, 3, 0), o),
    "eps is not a number": lambda t, s, o: (t, replaced(s, 3, float("nan")), o),
    "unknown activation": lambda t, s, o: (t, replaced(s, 4, "gelub"), o),
    "activation is a number": lambda t, s, o: (t, replaced(s, 4, 1), o),
    "activation of a surrogate": lambda t, s, o: (t, replaced(s, 4, "\ud800"), o),
    "split is a number": lambda t, s, o: (t, replaced(s, 5, 1), o),
    "other sizes expected": lambda t, s, o: (t, (*s[:-2], 65, 0), o),
    "out is no sequence": lambda t, s, o: (t, s, o[0]),
    "out is an iterator": lambda t, s, o: (t, s, iter(o)),
    "too few in out": lambda t, s, o: (t, s, o[:2]),
    "too many in out": lambda t, s, o: (t, s, (*o, o[0].clone())),
    "none in out": lambda t, s, o: (t, s, (*o[:2], None)),
    "a shape in out": lambda t, s, o: (t, s, (*o[:2], o[2][:, :1].contiguous())),
    "the same twice in out": lambda t, s, o: (t, s, (o[0], o[1], o[1])),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual(change):
    """It is left to the other way before anything is written, and the public call says the same."""
    call, tensors, settings = arguments("decoder_layer")
    out = tuple(torch.full_like(o, 7) for o in eager(call, tensors, settings, None))
    before = caches(tensors)
    changed = change(tensors, settings, out)
    assert eager(call, *changed) is None
    if changed[2] is out:
        assert eager(call, *changed[:2], None) is None
    assert equal(caches(tensors), before)
    assert all((o == 7).all() for o in out)

    def outcome(run: Callable[..., Any]) -> Any:
        try:
            return [result.tolist() for result in run(call, *change(tensors, settings, out))]
        except Exception as error:
            return type(error), str(error)

    if type(next(iter(changed[0]), None)) is torch.Tensor:
        assert outcome(public) == outcome(_torch_calls._run_native)


def test_wanted_gradients():
    call, tensors, settings = arguments("decoder_layer")
    with torch.enable_grad():
        assert eager(call, tensors, settings, None) is not None
        tensors[13].requires_grad_()
        assert eager(call, tensors, settings, None) is None
        results = ops.decoder_layer(*tensors, 3, num_heads=2, rotary_dim=8)
        assert all(result.requires_grad for result in results)
    assert eager(call, tensors, settings, None) is not None


def test_is_used_with_this_torch():
    assert _layer_calls.set_up_eager(other_way)


@pytest.mark.parametrize(
    "samples",
    [
        (),
        (1.0,),
        (torch.zeros(2).as_subclass(Subclass),),
        (torch.zeros(2), torch.zeros(2).to_sparse()),
        (torch.zeros(2, dtype=torch.complex64),),
        (torch.zeros(2, device="meta"),),
    ],
    ids=["none", "no tensor", "subclass", "sparse", "complex", "meta"],
)
def test_is_not_used_where_tensors_look_otherwise(samples):
    """What the samples do not show to be right is not relied on."""
    call, tensors, settings = arguments("decoder_layer")
    others = (_layer_calls._native.ops_eager_calls(), other_way, torch, torch.nn.Parameter)
    try:
        assert _layer_calls._eager.set_up(*others, samples) is False
        assert eager(call, tensors, settings, None) is None
        assert public(call, tensors, settings, None) is not None
    finally:
        _layer_calls.set_up_eager(other_way)
    assert eager(call, tensors, settings, None) is not None


def test_under_vmap():
    """Its tensors are plain ones by their type, but have no memory of their own."""
    call, tensors, settings = arguments("mlp_down")

    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        assert type(hidden_states) is torch.Tensor
        assert eager(call, (hidden_states, *tensors[1:]), settings, None) is None
        return hidden_states

    torch.vmap(run)(torch.stack([tensors[0], tensors[0]]))


def down_of_odd_size() -> tuple[LayerCall, tuple[torch.Tensor, ...], tuple[int, int]]:
    """A call whose result is made by itself: blocks are for multiples of 64 bytes."""
    shapes = ((1, 40), (1, 40), (48,), (40, 48), (40,))
    tensors = tuple(torch.ones(shape, dtype=torch.float16, device=DEVICE) for shape in shapes)
    return _layer_calls.MLP_DOWN, tensors, (0, 0)


def down_of_ones(*shape: int) -> tuple[torch.Tensor, ...]:
    """Tensors of `mlp_down` with an input of this shape; its results are 35."""
    hidden = shape[-1]
    shapes = (shape, (1, hidden), (32,), (hidden, 32), (hidden,))
    return tuple(torch.ones(shape, dtype=torch.float16, device=DEVICE) for shape in shapes)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU takes no such size")
def test_fake_results():
    """A mode that makes other tensors of the results."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call, tensors, settings = down_of_odd_size()
    assert eager(call, tensors, settings, None) is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert eager(call, tensors, settings, None) is None


def test_no_fake_results_stay_in_stock():
    """What a mode made is not given to those who call when it is over."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = down_of_ones(1, 3072)  # of no other test
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert eager(_layer_calls.MLP_DOWN, tensors, (0, 0), None) is None
    (result,) = eager(_layer_calls.MLP_DOWN, tensors, (0, 0), None)
    assert type(result) is torch.Tensor
    assert (result == 35).all()


# Sizes of no other test: results by themselves, and in blocks.
@pytest.mark.parametrize("hidden", [40, None])
@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.int8, 1536), (torch.bfloat16, 1792), (torch.float32, 2304)]
)
def test_no_other_results_stay_in_stock(dtype, multiple, hidden):
    """The same of a mode whose results are plain tensors, but not those that were asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            is_new = function is torch.ops.aten.new_empty.default
            return result.to(dtype) if is_new else result

    if hidden == 40 and DEVICE.type != "cpu":
        pytest.skip("a GPU takes no such size")
    tensors = down_of_ones(1, hidden or multiple)
    with Other():
        assert eager(_layer_calls.MLP_DOWN, tensors, (0, 0), None) is None
        with pytest.raises(TypeError, match="output: expected dtype float16"):
            ops.mlp_down(*tensors)
    for _ in range(40):
        result = ops.mlp_down(*tensors)
        assert result.dtype == torch.float16
        assert (result == 35).all()


def test_public_calls_take_the_short_way(monkeypatch):
    def fail(*arguments: Any) -> None:
        raise AssertionError(arguments[0])

    monkeypatch.setitem(_layer_calls.FRAMEWORKS, torch.Tensor, fail)
    values = tuple(torch_layer.random_tensors(SIZES, torch.float16, DEVICE, 8).values())
    options = {"num_heads": SIZES.num_heads, "rotary_dim": SIZES.rotary_dim}
    parts = ops.attention_mlp_up(*values[:15], 3, **options)
    ops.mlp_down(values[0], *parts[:2], *values[15:])
    out = ops.decoder_layer(*values, 3, **options)
    ops.decoder_layer(*values, 3, **options, split=True, out=out)
    sizes = LayerSizes(SIZES.hidden, SIZES.intermediate, SIZES.num_heads, SIZES.rotary_dim)
    calls = layer_calls("tiny", sizes)
    parts = calls.attention_only(*values[:15], 3)
    calls.mlp_only(values[0], *parts[:2], *values[15:])
    calls.decoder_layer(*values, 3)
    calls.decoder_layer_split(*values, 3)
    named = torch_layer.random_tensors(SIZES, torch.float16, DEVICE, 8)
    kept = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
    calls.create_graph_context(1, *(named[name] for name in kept), 8)
    given = inspect.signature(calls.graph_decode_step).parameters
    calls.graph_decode_step(1, *(named[name] for name in given if name in named), 3)
    with pytest.raises(AssertionError, match="LayerCall"):
        ops.decoder_layer(values[0].float(), *values[1:], 3, **options)


def test_large_results_are_no_blocks():
    """Such sizes are mistakes, which would leave blocks of gigabytes behind."""

    def held() -> int:
        if DEVICE.type == "cuda":
            return torch.cuda.memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) << 10

    tensors = down_of_ones(1024, 4096)  # a block would be 256 MiB
    before = held()
    assert eager(_layer_calls.MLP_DOWN, tensors, (0, 0), None) is None
    assert held() - before < 128 << 20


@pytest.mark.parametrize(
    "wrong", [(), (1,), (1, 2, 3, 4), (1, 2, 3), ((), (), None), ([], [], None)]
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name, wrong):
    assert ask(name, *wrong) is None


def test_stopping_is_no_error():
    """What is to end the program is not taken for a reason to try the other way."""

    class Stop(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    call, tensors, settings = down_of_odd_size()
    with pytest.raises(KeyboardInterrupt), Stop():
        eager(call, tensors, settings, None)


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept(name, usual):
    call, tensors, settings = arguments(name)
    values = [torch.tensor(3.0), *settings]
    if not usual:
        tensors = replaced(tensors, 3, tensors[3].float())
    out = None if not usual else eager(call, tensors, settings, None)

    def run(count: int) -> None:
        for _ in range(count):
            assert (eager(call, tensors, settings, None) is not None) == usual
            assert (eager(call, tensors, settings, out) is not None) == usual

    def references() -> list[int]:
        everything = (*tensors, *values, *(out or ()), tensors, settings, out)
        return [sys.getrefcount(value) for value in everything if value is not None]

    run(100)
    # Interned objects, such as None and small numbers, are everybody's.
    before, blocks = references(), sys.getallocatedblocks()
    run(10_000 if name == "mlp_down" else 3_000)
    after = references()
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True))
    assert after[: len(tensors)] == before[: len(tensors)]
    assert abs(sys.getallocatedblocks() - blocks) < 500


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_apart(mode):
    """Results of one block share its memory and nothing else."""
    call, tensors, settings = arguments("decoder_layer")
    with mode():
        calls = [eager(call, tensors, settings, None) for _ in range(70)]
        results = [result for one in calls for result in one]
        expected = [result.clone() for result in calls[0]]
        begins = sorted(result.data_ptr() for result in results)
        assert all(begin % 64 == 0 for begin in begins)
        assert min(b - a for a, b in itertools.pairwise(begins)) >= 2 * SIZES.hidden
        assert not any(result._is_view() or result._base is not None for result in results)
        for result in calls[1]:
            result.fill_(7)
        assert all(equal(one, expected) for one in (calls[0], *calls[2:]))
    if mode is not torch.inference_mode:
        assert {result._version for result in calls[1]} == {1}
        assert {result._version for one in (calls[0], *calls[2:]) for result in one} == {0}
        with torch.enable_grad():
            calls[2][0].add_(torch.nn.Parameter(torch.ones_like(expected[0])))
            assert calls[2][0].requires_grad and not calls[3][0].requires_grad


@pytest.mark.parametrize("elements", [0, 1 << 20])
def test_blocks_whose_storage_was_resized(elements):
    """As some free a tensor's memory: it is not written to any more."""
    call, tensors, settings = arguments("decoder_layer")
    expected = [result.clone() for result in eager(call, tensors, settings, None)]
    for index in range(3):
        results = eager(call, tensors, settings, None)
        results[index].untyped_storage().resize_(2 * elements)
        again = eager(call, tensors, settings, None)
        assert equal(again, expected)
        assert all(a.data_ptr() != r.data_ptr() for a, r in zip(again, results, strict=True))


def test_inference_tensors_are_told_apart():
    call, tensors, settings = arguments("decoder_layer")
    for inference in (True, False) * 40:
        with torch.inference_mode(inference):
            results = eager(call, tensors, settings, None)
        assert [result.is_inference() for result in results] == [inference] * 3


def test_many_shapes():
    """More than there are kept blocks for."""
    # Those that a GPU's kernels take.
    sizes = sorted({count * step for step in (32, 64, 128, 256) for count in range(1, 11)})
    shapes = [shape for hidden in sizes for shape in ((1, hidden), (1, 1, hidden))]
    assert len(shapes) > 32
    for shape in (*shapes, shapes[0]):
        tensors = down_of_ones(*shape)
        for _ in range(2):
            (result,) = eager(_layer_calls.MLP_DOWN, tensors, (0, 0), None)
            assert result.shape == shape
            assert (result == 35).all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_captured_results_are_the_graphs():
    """They do not come from a block, which a replay would write again after it was given away."""
    call, tensors, settings = arguments("decoder_layer")
    expected = eager(call, tensors, settings, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = eager(call, tensors, settings, None)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = eager(call, tensors, settings, None)
    with torch.cuda.stream(stream):
        after = [eager(call, tensors, settings, None) for _ in range(40)]
        for results in (before, *after):
            for result in results:
                result.fill_(7)
        graph.replay()
    stream.synchronize()
    assert equal(captured, expected)
    assert all((result == 7).all() for results in (before, *after) for result in results)
    for result in captured:
        assert result.untyped_storage().nbytes() == result.nbytes


def test_threads():
    layers = [arguments("decoder_layer", seed) for seed in range(4)]
    expected = [_torch_calls._run_native(*layer, None) for layer in layers]

    def run(index: int) -> bool:
        call, tensors, settings = layers[index]
        return all(equal(eager(call, tensors, settings, None), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(len(layers)) as pool:
        assert all(pool.map(run, range(len(layers))))
