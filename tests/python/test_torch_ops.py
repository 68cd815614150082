"""The layer calls on torch tensors, beside PyTorch's own layers, and as operators of torch.

On the CPU, or on the device that CLUSTERFUSION_TEST_DEVICE names.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from clusterfusion import ops, pythia
from conftest import ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

import torch_layer  # noqa: E402
from layer_reference import Sizes, random_arrays  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_layer import Tensors, relative_error  # noqa: E402

DEVICE = torch.device(os.environ.get("CLUSTERFUSION_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"
SHAPES = {
    "head_32": torch_layer.Sizes(64, 256, 2, 8),
    "head_64": torch_layer.Sizes(128, 512, 2, 16),
    "head_80": torch_layer.Sizes(160, 640, 2, 20),
    "head_128": torch_layer.Sizes(256, 1024, 2, 32),
    "head_256": torch_layer.Sizes(512, 2048, 2, 64),
    # The GPU's kernels want multiples of 32, and of 16 a head.
    "odd": torch_layer.Sizes(44, 17, 4, 6) if ON_CPU else torch_layer.Sizes(96, 160, 2, 6),
}
SMALL = SHAPES["head_32"]
POSITIONS = (0, 1, 63, 64, 65, 1000) if ON_CPU else (0, 1, 63, 64, 65, 1000, 2047)
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def options(sizes: torch_layer.Sizes) -> dict[str, Any]:
    return {"num_heads": sizes.num_heads, "rotary_dim": sizes.rotary_dim}


def small_tensors(dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensors:
    return torch_layer.random_tensors(SMALL, dtype, DEVICE, 8, seed)


def run_layer(tensors: Tensors, position: Any = 3, **more: Any) -> tuple[torch.Tensor, ...]:
    return ops.decoder_layer(*tensors.values(), position, **options(SMALL) | more)


def run_all(tensors: Tensors, sizes: torch_layer.Sizes, position: Any) -> list[torch.Tensor]:
    """output, k_new, v_new; attn_output, mlp_intermediate, k_new, v_new; output of the parts."""
    layer = ops.decoder_layer(*tensors.values(), position, **options(sizes))
    arguments = list(tensors.values())[:15]
    parts = ops.attention_mlp_up(*arguments, position, **options(sizes))
    down = (tensors["mlp_down_weight"], tensors["mlp_down_bias"])
    return [*layer, *parts, ops.mlp_down(tensors["input"], *parts[:2], *down)]


def run_all_of_torch(
    tensors: Tensors, sizes: torch_layer.Sizes, position: int
) -> list[torch.Tensor]:
    parts = torch_layer.attention_mlp_up(tensors, sizes, position)
    output = torch_layer.mlp_down(tensors, *parts[:2])
    return [output, *parts[2:], *parts, output]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch(shape, dtype, heavy_tailed):
    """Over all positions, the error against float64 is at most that of PyTorch in the same dtype.

    At one position of so small a layer a few elements decide; there it is not far above.
    """
    sizes = SHAPES[shape]
    tensors = torch_layer.random_tensors(
        sizes, dtype, DEVICE, POSITIONS[-1] + 1, heavy_tailed=heavy_tailed
    )
    errors, limits = [], []
    for position in POSITIONS:
        reference = run_all_of_torch(torch_layer.widened(tensors), sizes, position)
        theirs = run_all_of_torch(tensors, sizes, position)
        ours = run_all(tensors, sizes, position)
        for values, peer in zip(ours, theirs, strict=True):
            assert values.dtype == dtype
            assert values.shape == peer.shape
        errors.append([relative_error(o, r) for o, r in zip(ours, reference, strict=True)])
        limits.append(
            [
                max(relative_error(t, r), relative_error(r.to(dtype), r))
                for t, r in zip(theirs, reference, strict=True)
            ]
        )
    found, most = torch.tensor(errors), torch.tensor(limits)
    assert (found <= (1.1 if ON_CPU else 1.25) * most).all(), found / most
    found, most = (each.square().mean(0).sqrt() for each in (found, most))
    # Both may be one rounding away; a tie may fall either way.
    assert (found <= 1.1 * most).all(), found / most


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("shape", SHAPES)
def test_infinities_go_where_torch_lets_them(shape, name):
    """A score of -inf hides its position; an infinite value makes what it enters infinite."""
    sizes = SHAPES[shape]
    tensors = torch_layer.random_tensors(sizes, torch.float16, DEVICE, 70)
    last = torch.arange(1, sizes.num_heads + 1, device=DEVICE) * sizes.head_dim - 1
    if name == "k_cache":
        # The query's last element is positive in each head, and is not rotated.
        tensors["bias_qkv"].view(sizes.num_heads, 3, sizes.head_dim)[:, 0, -1] = 100.0
    tensors[name][3, last] = -torch.inf
    ours = run_all(tensors, sizes, 65)
    theirs = run_all_of_torch(tensors, sizes, 65)
    for values, expected in zip(ours, theirs, strict=True):
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.isinf(), expected.isinf())
    if name == "k_cache":
        assert all(values.isfinite().all() for values in ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_beside_torch_in_float32(shape):
    sizes = SHAPES[shape]
    tensors = torch_layer.random_tensors(sizes, torch.float16, DEVICE, 70)
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    ours = run_all(tensors, sizes, 65)
    for values, expected in zip(ours, run_all_of_torch(wide, sizes, 65), strict=True):
        assert relative_error(values, expected) < 1e-3


@pytest.mark.skipif(not ON_CPU, reason="NumPy's arrays are on the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_as_numpy(dtype):
    arrays = random_arrays(Sizes(64, 2, 256, 8), np.float32, 8)
    tensors = {
        name: torch.from_numpy(array).to(torch.float32 if name in ("cos", "sin") else dtype)
        for name, array in arrays.items()
    }
    if dtype == torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        arrays = {
            name: t.numpy()
            if t.dtype == torch.float32
            else t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            for name, t in ((name, t.clone()) for name, t in tensors.items())
        }
    else:
        arrays = {name: tensor.clone().numpy() for name, tensor in tensors.items()}
    expected = ops.decoder_layer(*arrays.values(), 3, **options(SMALL))
    results = run_layer(tensors)
    assert [r.view(torch.int16).numpy().tobytes() for r in results] == [
        e.tobytes() for e in expected
    ]


def test_nothing_is_copied():
    tensors = small_tensors()
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    before = {name: tensors[name].clone() for name in ("k_cache", "v_cache")}
    _, k_new, v_new = run_layer(tensors)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses
    for name, new in (("k_cache", k_new), ("v_cache", v_new)):
        before[name][3] = new.view(-1)
        assert torch.equal(tensors[name], before[name])


@pytest.mark.parametrize("position", [torch.tensor(3), torch.tensor([3])])
def test_position_as_tensor(position):
    tensors = small_tensors()
    position = position.to(DEVICE)
    expected = run_layer(tensors)
    assert equal(run_layer(tensors, position.int()), expected)
    with pytest.raises(TypeError, match=r"^current_seq_len: expected dtype int32, found int64$"):
        run_layer(tensors, position)


def test_out():
    tensors = small_tensors()
    expected = run_layer(tensors)
    out = tuple(torch.full_like(tensor, torch.nan) for tensor in expected)
    results = run_layer(tensors, out=out)
    assert all(result is o for result, o in zip(results, out, strict=True))
    assert equal(results, expected)


class Other(TorchDispatchMode):
    """A mode of torch that makes other tensors than those that were asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result.float() if function is torch.ops.aten.new_empty.default else result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_ordinary_tensors(mode):
    """Each has memory of its own, as any other new tensor has."""
    with mode():
        results = run_all(small_tensors(), SMALL, 3)
        others = run_all(small_tensors(), SMALL, 3)
        like = small_tensors()["input"].new_empty(1)
    for result, other in zip(results, others, strict=True):
        assert type(result) is torch.Tensor
        assert result.untyped_storage().nbytes() == result.nbytes
        assert result.storage_offset() == 0
        assert result.is_contiguous()
        assert result.is_inference() == like.is_inference()
        assert not result._is_view() and result._base is None and not result.requires_grad
        if mode is not torch.inference_mode:
            assert result._version == 0
        saved = io.BytesIO()
        torch.save(result, saved)
        assert saved.tell() < result.nbytes + 2000
        saved.seek(0)
        assert torch.equal(torch.load(saved).to(DEVICE), result)
        with mode():
            result.resize_(2 * result.numel()).fill_(7)
            result.untyped_storage().resize_(0)
            assert result.untyped_storage().nbytes() == 0
        assert torch.isfinite(other).all() and not (other == 7).all()
    assert equal(others, run_all(small_tensors(), SMALL, 3))


def test_results_that_a_mode_changes():
    with Other(), pytest.raises(TypeError, match=r"^output: expected dtype float16"):
        run_layer(small_tensors())


def test_results_that_are_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = small_tensors()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match=r"^output: "):
        run_layer(tensors)


def test_under_vmap():
    """Its tensors are plain ones by their type, but have no memory of their own."""
    tensors = small_tensors()

    def run(x: torch.Tensor) -> torch.Tensor:
        return run_layer(tensors | {"input": x})[0]

    with pytest.raises(TypeError, match=r"^input: expected a dense tensor"):
        torch.vmap(run)(torch.stack([tensors["input"], tensors["input"]]))


def test_nothing_is_kept():
    """Neither a call's arguments nor what it makes, whether it succeeds or not."""
    tensors = small_tensors()
    wrong = tensors | {"weight_o": tensors["weight_o"].float()}
    out = run_layer(tensors)
    values = [*tensors.values(), wrong["weight_o"], *out]

    def run(count: int) -> None:
        for _ in range(count):
            run_layer(tensors)
            run_layer(tensors, out=out)
            with pytest.raises(TypeError, match=r"^weight_o: "):
                run_layer(wrong)

    def allocated() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    run(20)
    before, blocks = [sys.getrefcount(value) for value in values], allocated()
    run(500)
    after = allocated()
    assert [sys.getrefcount(value) for value in values] == before
    assert abs(after - blocks) < 100


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode):
    tensors = small_tensors()
    expected = run_layer(tensors)
    with mode():
        results = run_layer(small_tensors())
    assert equal(results, expected)
    assert not any(result.requires_grad for result in results)


def test_module_parameters():
    """Weights of modules want gradients, of which there are none: asking for one raises."""
    tensors = small_tensors()
    expected = run_layer(tensors)
    modules = {
        name: tensor
        if name in ("input", "k_cache", "v_cache", "cos", "sin")
        else torch.nn.Parameter(tensor)
        for name, tensor in tensors.items()
    }
    assert equal(run_layer(modules), expected)
    with torch.enable_grad():
        results = run_layer(modules)
        assert equal(results, expected)
        with pytest.raises(RuntimeError, match=r"clusterfusion\.decoder_layer"):
            results[0].sum().backward()
        modules["weight_o"] = None
        with pytest.raises(TypeError, match=r"^weight_o: expected a tensor, found none$"):
            run_layer(modules)


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda t: t.to("meta"), TypeError, r"expected a dense tensor in CPU or CUDA memory"),
        (lambda t: t.to_sparse(), TypeError, r"expected a dense tensor in CPU or CUDA memory"),
        (lambda t: t.float(), TypeError, r"expected dtype float16, as input has, found float32$"),
        (lambda t: t.T.contiguous().T, ValueError, r"expected a contiguous .* strides \[1, 192\]"),
        (lambda t: t[:, :32], ValueError, r"expected shape \[192, 64\] .*found \[192, 32\]$"),
        (lambda t: None, TypeError, r"expected a tensor, found none$"),
        (lambda t: [t], TypeError, r"expected a tensor, found list or tuple$"),
    ],
)
def test_errors_name_the_argument(spoil, kind, message):
    tensors = small_tensors()
    tensors["weight_qkv"] = spoil(tensors["weight_qkv"])
    before = tensors["k_cache"].clone()
    with pytest.raises(kind, match=rf"^weight_qkv: {message}"):
        run_layer(tensors)
    assert torch.equal(tensors["k_cache"], before)


def test_first_argument_is_no_tensor():
    tensors = small_tensors() | {"input": 1.0}
    with pytest.raises(TypeError, match=r"^input: expected a torch.Tensor .*found float$"):
        run_layer(tensors)


def test_threads():
    sizes = torch_layer.Sizes(512, 1024, 8, 16)
    layers = [torch_layer.random_tensors(sizes, torch.float16, DEVICE, 70, s) for s in range(4)]

    def run(tensors: Tensors) -> list[torch.Tensor]:
        return [r for position in (3, 64, 69) for r in run_all(tensors, sizes, position)]

    expected = [run(tensors) for tensors in layers]
    with ThreadPoolExecutor(len(layers)) as pool:
        for results, one in zip(pool.map(run, layers), expected, strict=True):
            assert equal(results, one)


# ---- operators of torch ----

LAYER_OPTIONS = (SMALL.num_heads, SMALL.rotary_dim, 1e-5, "gelu")


def operator_arguments(name: str, position: Any) -> tuple[Any, ...]:
    tensors = small_tensors()
    values = list(tensors.values())
    if name == "mlp_down":
        intermediate = torch.ones(SMALL.intermediate, dtype=torch.float16, device=DEVICE)
        return (values[0], values[0].clone(), intermediate, *values[15:], 0, 0)
    where = (0, position) if isinstance(position, torch.Tensor) else (position, None)
    if name == "attention_mlp_up":
        return (*values[:15], *where, *LAYER_OPTIONS, 0, 0)
    return (*values, *where, *LAYER_OPTIONS, False, 0, 0)


@pytest.mark.parametrize("position", [3, torch.tensor([3], dtype=torch.int32, device=DEVICE)])
@pytest.mark.parametrize("name", ["attention_mlp_up", "mlp_down", "decoder_layer"])
def test_opcheck(name, position):
    operator = getattr(torch.ops.clusterfusion, name).default
    torch.library.opcheck(operator, operator_arguments(name, position))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = small_tensors()
    expected = run_all(tensors, SMALL, 3)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        results = run_all(fakes, SMALL, 3)
    assert [(r.shape, r.dtype, r.device) for r in results] == [
        (e.shape, e.dtype, e.device) for e in expected
    ]


# The default one compiles C++ for a minute: once is enough.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    def step(position: Any, tensors: Tensors) -> list[torch.Tensor]:
        return [result * 2 for result in run_all(tensors, SMALL, position)]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for position in (1, 2, 5, torch.tensor([6], dtype=torch.int32, device=DEVICE)):
        eager, traced = small_tensors(), small_tensors()
        assert equal(compiled(position, traced), step(position, eager))
        for name in ("k_cache", "v_cache"):
            assert torch.equal(traced[name], eager[name])
            assert not torch.equal(traced[name], small_tensors()[name])


def test_compile_with_out():
    def step(tensors: Tensors, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return run_layer(tensors, out=out)[0] * 2

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = run_layer(small_tensors())
    out = tuple(torch.full_like(tensor, torch.nan) for tensor in expected)
    assert torch.equal(compiled(small_tensors(), out), expected[0] * 2)
    assert equal(out, expected)
    # Some versions of torch show the parts of a message that is raised while they compile.
    for k_new, message in (
        (out[1].expand(5, 2, 32).clone(), r"k_new.*: expected shape .*\[1, 2, 32\].*, found "),
        (out[1].float(), r"k_new.*: expected dtype .*float16.*, found "),
    ):
        with pytest.raises(Exception, match=message):
            compiled(small_tensors(), (out[0], k_new, out[2]))


def test_compile_named_calls():
    sizes = pythia.LayerSizes(SMALL.hidden, SMALL.intermediate, SMALL.num_heads, SMALL.rotary_dim)
    calls = pythia.layer_calls("small", sizes)
    t = small_tensors()
    expected = run_layer(t)
    kept = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
    calls.create_graph_context(1, *(t[name] for name in kept), 8)

    def step(x: torch.Tensor, position: int) -> list[torch.Tensor]:
        t["input"] = x
        layer = list(t.values())
        parts = calls.attention_only(*layer[:15], position)
        context = calls.graph_decode_step(
            1, x, *layer[7:9], t["bias_qkv"], t["bias_o"], t["cos"], t["sin"], *layer[5:7],
            *layer[11:13], t["mlp_up_bias"], t["mlp_down_bias"], position,
        )  # fmt: skip
        return [
            calls.decoder_layer(*layer, position)[0],
            calls.decoder_layer_split(*layer, position)[0],
            context[0],
            calls.mlp_only(x, *parts[:2], *layer[15:]),
        ]

    torch.compiler.reset()
    results = torch.compile(step, fullgraph=True, backend="aot_eager")(t["input"], 3)
    assert equal(results, step(t["input"], 3))
    assert torch.equal(results[0], expected[0])
