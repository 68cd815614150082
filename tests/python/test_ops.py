"""The layer calls on NumPy arrays: numbers against float64, errors one by one, threads, forks.

bfloat16 needs the package ml_dtypes. What needs torch is in test_torch_ops.py.
"""

from __future__ import annotations

import inspect
import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import clusterfusion
import numpy as np
import pytest
from clusterfusion import ops, pythia
from layer_reference import (
    Arrays,
    Layer,
    Sizes,
    bfloat16,
    random_arrays,
    reference_layer,
    shapes_of,
)
from reference_model import ACTIVATIONS, relative_error

# Every head size of the Pythia suite, and shapes that are multiples of nothing.
SHAPES = {
    "head_32": Sizes(64, 2, 256, 8),
    "head_64": Sizes(128, 2, 512, 16),
    "head_80": Sizes(160, 2, 640, 20),
    "head_128": Sizes(256, 2, 1024, 32),
    "head_256": Sizes(512, 2, 2048, 64),
    "full_rotation": Sizes(48, 3, 20, 16),
    "no_rotation": Sizes(24, 3, 40, 0),
    "odd": Sizes(44, 4, 17, 6),
    "tiny": Sizes(2, 1, 1, 2),
}
POSITIONS = (0, 1, 63, 64, 65, 1000)
DTYPES = [
    pytest.param(np.float16, id="float16"),
    pytest.param(
        bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(bfloat16 is None, reason="ml_dtypes is not installed"),
    ),
]
SMALL = SHAPES["head_32"]


def options(sizes: Sizes) -> dict[str, Any]:
    return {"num_heads": sizes.num_heads, "rotary_dim": sizes.rotary_dim}


def layer_arguments(arrays: Arrays) -> list[Any]:
    return list(arrays.values())


def attention_arguments(arrays: Arrays) -> list[Any]:
    return layer_arguments(arrays)[:15]


def run_parts(arrays: Arrays, position: Any, sizes: Sizes, **more: Any) -> tuple[Any, ...]:
    """attn_output, mlp_intermediate, k_new, v_new, output, by the two calls for parts."""
    results = ops.attention_mlp_up(*attention_arguments(arrays), position, **options(sizes), **more)
    output = ops.mlp_down(
        arrays["input"], *results[:2], arrays["mlp_down_weight"], arrays["mlp_down_bias"]
    )
    return (*results, output)


def assert_close(values: np.ndarray, expected: np.ndarray, slack: float = 1e-5) -> None:
    """The error is that of rounding the float64 result once, and float32 sums."""
    expected = expected.reshape(values.shape)
    rounding = relative_error(expected.astype(values.dtype).astype(np.float64), expected)
    assert relative_error(values.astype(np.float64), expected) <= 1.05 * rounding + slack


def assert_layer(arrays: Arrays, position: int, sizes: Sizes, expected: Layer) -> None:
    before = {name: arrays[name].copy() for name in ("k_cache", "v_cache")}
    output, k_new, v_new = ops.decoder_layer(*layer_arguments(arrays), position, **options(sizes))
    assert_close(output, expected.output)
    assert_close(k_new, expected.k_new)
    assert_close(v_new, expected.v_new)
    assert output.shape == arrays["input"].shape
    assert k_new.shape == v_new.shape == (1, sizes.num_heads, sizes.head_dim)
    for cache, new in (("k_cache", k_new), ("v_cache", v_new)):
        before[cache][position] = new.reshape(-1)
        assert arrays[cache].tobytes() == before[cache].tobytes()
    assert {type(output), type(k_new), type(v_new)} == {np.ndarray}
    assert output.dtype == k_new.dtype == v_new.dtype == arrays["input"].dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, dtype):
    sizes = SHAPES[shape]
    arrays = random_arrays(sizes, dtype, POSITIONS[-1] + 1)
    for position in POSITIONS:
        expected = reference_layer(arrays, position, sizes)
        assert_layer(arrays, position, sizes, expected)
        parts = run_parts(arrays, position, sizes)
        assert [p.shape for p in parts[:2]] == [(1, sizes.hidden), (sizes.intermediate,)]
        assert_close(parts[0], expected.attn_output)
        assert_close(parts[1], expected.mlp_intermediate)
        assert_close(parts[2], expected.k_new)
        assert_close(parts[3], expected.v_new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_down(dtype):
    arrays = random_arrays(SMALL, dtype, 4)
    *parts, output = run_parts(arrays, 3, SMALL)
    wide = {name: value.astype(np.float64) for name, value in arrays.items()}
    down = wide["mlp_down_weight"] @ parts[1].astype(np.float64) + wide["mlp_down_bias"]
    assert_close(output, wide["input"] + parts[0].astype(np.float64) + down)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 65])
def test_heavy_tailed_weights(position, dtype):
    sizes = SHAPES["head_80"]
    arrays = random_arrays(sizes, dtype, 70, heavy_tailed=True)
    assert_layer(arrays, position, sizes, reference_layer(arrays, position, sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(dtype):
    """LayerNorm's variance is small beside the square of the mean."""
    sizes = SHAPES["head_64"]
    arrays = random_arrays(sizes, dtype, 4, mean=500.0)
    expected = reference_layer(arrays, 3, sizes)
    results = run_parts(arrays, 3, sizes)
    assert_close(results[0], expected.attn_output, slack=1e-4)
    assert_close(results[1], expected.mlp_intermediate, slack=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    arrays = random_arrays(SMALL, np.float16, 4)
    expected = reference_layer(arrays, 2, SMALL, activation=activation)
    results = run_parts(arrays, 2, SMALL, activation=activation)
    assert_close(results[1], expected.mlp_intermediate)


def test_layer_norm_eps():
    arrays = random_arrays(SMALL, np.float16, 4)
    expected = reference_layer(arrays, 2, SMALL, eps=0.5)
    assert_close(run_parts(arrays, 2, SMALL, layer_norm_eps=0.5)[0], expected.attn_output)


@pytest.mark.parametrize("missing", [("bias_qkv",), ("bias_o",), ("bias_qkv", "bias_o")])
def test_without_attention_biases(missing):
    arrays = random_arrays(SMALL, np.float16, 4) | dict.fromkeys(missing)
    assert_layer(arrays, 2, SMALL, reference_layer(arrays, 2, SMALL))


def test_tables_padded_to_a_head():
    """1 and 0 past rotary_dim change nothing; every value meets its own cos and sin."""
    sizes = SHAPES["head_80"]
    arrays = random_arrays(sizes, np.float16, 4)
    random = np.random.default_rng(3)
    arrays["cos"] = random.standard_normal(sizes.rotary_dim).astype(np.float32)
    arrays["sin"] = random.standard_normal(sizes.rotary_dim).astype(np.float32)
    expected = reference_layer(arrays, 2, sizes)
    rest = sizes.head_dim - sizes.rotary_dim
    padded = arrays | {
        "cos": np.concatenate([arrays["cos"], np.ones(rest, np.float32)])[None],
        "sin": np.concatenate([arrays["sin"], np.zeros(rest, np.float32)])[None],
    }
    for tables in (arrays, padded):
        k_new = ops.decoder_layer(*layer_arguments(tables), 2, **options(sizes))[1]
        assert_close(k_new, expected.k_new)
    k_new = ops.decoder_layer(*layer_arguments(arrays), 2, num_heads=sizes.num_heads)[1]
    assert_close(k_new, expected.k_new)


def test_input_of_three_dimensions():
    arrays = random_arrays(SMALL, np.float16, 4)
    flat = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))[0]
    arrays["input"] = arrays["input"][None]
    output = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))[0]
    assert output.shape == (1, 1, SMALL.hidden)
    assert output.tobytes() == flat.tobytes()
    assert run_parts(arrays, 2, SMALL)[-1].shape == (1, 1, SMALL.hidden)


@pytest.mark.parametrize(
    "position",
    [np.int64(2), np.array(2, np.int32), np.array([2], np.int32)],
    ids=["integer of NumPy", "0-d", "1-d"],
)
def test_position_as_array(position):
    arrays = random_arrays(SMALL, np.float16, 4)
    expected = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))
    results = ops.decoder_layer(*layer_arguments(arrays), position, **options(SMALL))
    assert [r.tobytes() for r in results] == [e.tobytes() for e in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype):
    arrays = random_arrays(SMALL, dtype, 4)
    expected = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))
    out = tuple(np.full_like(array, np.nan) for array in expected)
    results = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL), out=out)
    assert all(result is o for result, o in zip(results, out, strict=True))
    assert [r.tobytes() for r in results] == [e.tobytes() for e in expected]

    *parts, output = run_parts(arrays, 2, SMALL)
    out = tuple(np.full_like(array, np.nan) for array in parts)
    results = ops.attention_mlp_up(*attention_arguments(arrays), 2, **options(SMALL), out=out)
    assert all(result is o for result, o in zip(results, out, strict=True))
    assert [r.tobytes() for r in results] == [p.tobytes() for p in parts]
    one = np.full_like(output, np.nan)
    down = (arrays["mlp_down_weight"], arrays["mlp_down_bias"])
    assert ops.mlp_down(arrays["input"], *parts[:2], *down, out=one) is one
    assert one.tobytes() == output.tobytes()


def test_split_is_the_same_on_the_cpu():
    arrays = random_arrays(SMALL, np.float16, 4)
    whole = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))
    split = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL), split=True)
    assert [r.tobytes() for r in split] == [r.tobytes() for r in whole]


def test_views_and_read_only_weights():
    """Nothing is copied: caches may be views of larger ones, weights may be mapped read-only."""
    arrays = random_arrays(SMALL, np.float16, 4)
    expected = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))[0]
    both = np.stack([arrays["k_cache"], arrays["v_cache"]])
    arrays["k_cache"], arrays["v_cache"] = both
    for name, array in arrays.items():
        if name not in ("k_cache", "v_cache"):
            array.flags.writeable = False
    try:
        output, k_new, _ = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))
    except TypeError as error:
        assert np.lib.NumpyVersion(np.__version__) < "2.1.0"
        assert "from version 2.1 on" in str(error)
        return
    assert output.tobytes() == expected.tobytes()
    assert both[0, 2].tobytes() == k_new.tobytes()


class OtherArray(np.ndarray):
    pass


def test_subclass_of_array():
    arrays = random_arrays(SMALL, np.float16, 4)
    expected = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))[0]
    arrays["input"] = arrays["input"].view(OtherArray)
    output = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))[0]
    assert output.tobytes() == expected.tobytes()


def test_threads():
    sizes = Sizes(512, 8, 1024, 16)  # enough work for several cores
    layers = [random_arrays(sizes, np.float16, 70, seed) for seed in range(6)]

    def run(arrays: Arrays) -> list[bytes]:
        results = []
        for position in (3, 64, 69) * 3:
            results += run_parts(arrays, position, sizes)
            results += ops.decoder_layer(*layer_arguments(arrays), position, **options(sizes))
        return [result.tobytes() for result in results]

    expected = [run(arrays) for arrays in layers]
    with ThreadPoolExecutor(len(layers)) as pool:
        for _ in range(3):
            assert list(pool.map(run, layers)) == expected


def _run_in_child(arrays: Arrays, sizes: Sizes, results: Any) -> None:
    output = ops.decoder_layer(*layer_arguments(arrays), 3, **options(sizes))[0]
    results.put(output.tobytes())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    """A forked process has none of its parent's threads."""
    sizes = Sizes(512, 8, 1024, 16)
    arrays = random_arrays(sizes, np.float16, 4)
    expected = ops.decoder_layer(*layer_arguments(arrays), 3, **options(sizes))[0].tobytes()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_run_in_child, args=(arrays, sizes, results))
    child.start()
    assert results.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


# ---- errors ----


def transposed(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array) if array.ndim == 2 else np.repeat(array, 2)[::2]


def misaligned(array: np.ndarray) -> np.ndarray:
    room = np.empty(array.size + 16, array.dtype)
    start = (-room.ctypes.data % 16) // array.itemsize + 1
    view = room[start : start + array.size].reshape(array.shape)
    view[...] = array
    return view


MATRICES = ("weight_qkv", "weight_o", "k_cache", "v_cache", "mlp_up_weight", "mlp_down_weight")
ALL = list(shapes_of(SMALL, 4))
NARROW = [name for name in ALL if name not in ("cos", "sin")]


def refuse(kind: type[Exception], message: str, change: dict[str, Any], **more: Any) -> None:
    """The call raises, with all of `message`, and leaves the caches alone."""
    arrays = random_arrays(SMALL, np.float16, 4)
    arrays |= {k: v(arrays[k]) if callable(v) else v for k, v in change.items()}
    position = more.pop("position", 2)
    caches = [arrays[name] for name in ("k_cache", "v_cache")]
    before = [c.tobytes() if isinstance(c, np.ndarray) else c for c in caches]
    with pytest.raises(kind, match=message):
        ops.decoder_layer(*layer_arguments(arrays), position, **options(SMALL) | more)
    assert [c.tobytes() if isinstance(c, np.ndarray) else c for c in caches] == before


@pytest.mark.parametrize("name", NARROW)
def test_wrong_dtype(name):
    message = rf"^{name}: expected dtype float16.*, found float32$"
    refuse(TypeError, message, {name: lambda a: a.astype(np.float32)})


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_wrong_dtype_of_tables(name):
    message = rf"^{name}: expected dtype float32, found float16$"
    refuse(TypeError, message, {name: lambda a: a.astype(np.float16)})


@pytest.mark.parametrize("name", ALL)
def test_wrong_shape(name):
    def cut(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[..., :-1])

    if name == "input":  # which says how long all rows are
        refuse(ValueError, "^num_heads: expected a divisor of the hidden size 63", {name: cut})
        message = r"^weight_qkv: expected shape \[96, 32\].*found \[192, 64\]"
        refuse(ValueError, message, {name: lambda a: a[:, :32].copy()})
    else:
        refuse(ValueError, rf"^{name}: expected shape .*found \[", {name: cut})


@pytest.mark.parametrize("name", NARROW)
def test_another_dimension(name):
    refuse(
        ValueError, rf"^{name}: expected shape .*found \[2, ", {name: lambda a: np.stack([a, a])}
    )


@pytest.mark.parametrize("name", MATRICES)
def test_not_contiguous(name):
    message = rf"^{name}: expected a contiguous row-major tensor, found strides \["
    refuse(ValueError, message, {name: transposed})


@pytest.mark.parametrize("name", NARROW)
def test_misaligned(name):
    message = rf"^{name}: expected an address that is a multiple of 16 bytes, found one 2 bytes"
    refuse(ValueError, message, {name: misaligned})


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize(
    ("value", "found"), [(None, "none"), (3, "int"), ("x", "str"), ([1], "li")]
)
def test_no_tensor(name, value, found):
    if name in ("bias_qkv", "bias_o", "mlp_up_bias", "mlp_down_bias") and value is None:
        pytest.skip("may be None")
    if name == "input":
        found = type(value).__name__
    refuse(TypeError, rf"^{name}: expected a.*, found {found}", {name: value})


@pytest.mark.parametrize(
    ("position", "kind", "message"),
    [
        (4, ValueError, r"expected 0 to 3, found 4: the caches of 4 positions are full"),
        (5, ValueError, r"expected 0 to 3, because the caches have 4 positions, found 5"),
        (-1, ValueError, r"expected 0 to 3, .*found -1"),
        (2**70, TypeError, r"found int of more than 64 bits"),
        (1.0, TypeError, r"expected an integer or an int32 tensor of one element, found float"),
        (True, TypeError, r"found bool"),
        (None, TypeError, r"found None"),
        (np.array([4], np.int32), ValueError, r"full"),
        (np.array([1, 2], np.int32), ValueError, r"expected shape \[1\].*found \[2\]"),
        (np.array([1], np.int64), TypeError, r"expected dtype int32, found int64"),
    ],
)
def test_wrong_position(position, kind, message):
    refuse(kind, rf"^current_seq_len: .*{message}", {}, position=position)


@pytest.mark.parametrize(
    ("option", "value", "kind", "message"),
    [
        ("num_heads", 0, ValueError, r"expected a divisor of the hidden size 64, found 0"),
        ("num_heads", -2, ValueError, r"found -2"),
        ("num_heads", 3, ValueError, r"found 3"),
        ("num_heads", 2.0, TypeError, r"expected an integer, found float"),
        ("num_heads", None, TypeError, r"expected an integer, found None"),
        ("rotary_dim", 7, ValueError, r"expected an even number of 0 to 32 \(head_dim\), found 7"),
        ("rotary_dim", 34, ValueError, r"found 34"),
        ("rotary_dim", "8", TypeError, r"expected an integer or None, found str"),
        ("layer_norm_eps", -1.0, ValueError, r"expected a finite number of at least 0, found -1"),
        ("layer_norm_eps", float("nan"), ValueError, r"found nan"),
        ("layer_norm_eps", None, TypeError, r"expected a number, found None"),
        ("activation", "gelu2", NotImplementedError, r'"gelu2" is not supported; expected one of'),
        ("activation", 1, TypeError, r"expected str, found int"),
        ("split", 1, TypeError, r"expected bool, found int"),
        ("out", 1, TypeError, r"expected a tuple \(output, k_new, v_new\), found int"),
        ("out", (1, 2), ValueError, r"expected 3 tensors \(output, k_new, v_new\), found 2"),
    ],
)
def test_wrong_option(option, value, kind, message):
    refuse(kind, rf"^{option}: .*{message}", {}, **{option: value})


def test_padded_tables_need_rotary_dim():
    tables = {"cos": np.ones(32, np.float32), "sin": np.zeros(32, np.float32)}
    message = r"^rotary_dim: expected a number, because cos has as many values as a head \(32\)"
    refuse(ValueError, message, tables, rotary_dim=None)
    refuse(ValueError, r"^sin: expected shape \[32\]", {"cos": tables["cos"]})


def test_wrong_results():
    arrays = random_arrays(SMALL, np.float16, 4)
    good = ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL))
    for index, name in enumerate(("output", "k_new", "v_new")):
        for kind, message, value in (
            (ValueError, rf"^{name}: expected shape", good[index][..., :-1].copy()),
            (TypeError, rf"^{name}: expected dtype float16", good[index].astype(np.float32)),
            (TypeError, rf"^{name}: expected a tensor, found none", None),
            (ValueError, rf"^{name}: expected an address", misaligned(good[index])),
        ):
            out = [*good[:index], value, *good[index + 1 :]]
            refuse(kind, message, {}, out=out)


def test_overlap():
    arrays = random_arrays(SMALL, np.float16, 4)
    message = r"^k_cache: expected memory of its own, because it is written, .*overlaps v_cache$"
    refuse(ValueError, message, dict.fromkeys(("k_cache", "v_cache"), arrays["k_cache"]))
    k_new, v_new = (np.empty((1, 2, 32), np.float16) for _ in range(2))
    with pytest.raises(ValueError, match=r"^output: .*overlaps input$"):
        ops.decoder_layer(
            *layer_arguments(arrays), 2, **options(SMALL), out=(arrays["input"], k_new, v_new)
        )
    with pytest.raises(ValueError, match=r"^k_new: .*overlaps v_new$"):
        output = np.empty((1, 64), np.float16)
        ops.decoder_layer(*layer_arguments(arrays), 2, **options(SMALL), out=(output, k_new, k_new))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_read_only_cache(name):
    def freeze(array: np.ndarray) -> np.ndarray:
        array.flags.writeable = False
        return array

    refuse(ValueError, rf"^{name}: expected a writable array", {name: freeze})


@pytest.mark.parametrize("dtype", [">f2", object, "S2"])
@pytest.mark.parametrize("writable", [True, False])
def test_types_that_dlpack_does_not_know(dtype, writable):
    def changed(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array.flags.writeable = writable
        return array

    message = "expected a dense tensor in CPU or CUDA memory"
    if not writable and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        message = "expected a writable array"
    refuse(TypeError, rf"^ln_bias: {message}", {"ln_bias": changed})


def test_empty_sizes():
    empty = np.empty((1, 0), np.float16)
    with pytest.raises(ValueError, match=r"^input: expected shape"):
        ops.decoder_layer(empty, *[empty] * 16, 0, num_heads=1)
    refuse(
        ValueError, r"^k_cache: expected shape \[max_seq_len, 64\]", {"k_cache": lambda a: a[:0]}
    )
    inner = {"mlp_up_weight": lambda a: a[:0]}
    refuse(ValueError, r"^mlp_up_weight: expected shape \[intermediate, 64\]", inner)


def test_errors_of_the_parts():
    arrays = random_arrays(SMALL, np.float16, 4)
    *parts, _ = run_parts(arrays, 2, SMALL)
    down = [arrays["input"], *parts[:2], arrays["mlp_down_weight"], arrays["mlp_down_bias"]]
    names = ("hidden_states", "attn_output", "mlp_intermediate", "mlp_down_weight", "mlp_down_bias")
    for index, name in enumerate(names):
        wrong = [*down[:index], down[index].astype(np.float32), *down[index + 1 :]]
        with pytest.raises(TypeError, match=rf"^{name}: expected dtype float16"):
            ops.mlp_down(*wrong)
    with pytest.raises(ValueError, match=r"^output: .*overlaps hidden_states$"):
        ops.mlp_down(*down, out=arrays["input"])
    with pytest.raises(ValueError, match=r"^mlp_intermediate: expected shape \[256\]"):
        results = (parts[0], parts[1][:-1].copy(), *parts[2:])
        ops.attention_mlp_up(*attention_arguments(arrays), 2, **options(SMALL), out=results)


# ---- calls by the names of models ----

SIGNATURES = """
attention_only(input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias,
    cos, sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, current_seq_len)
mlp_only(hidden_states, attn_output, mlp_intermediate, mlp_down_weight, mlp_down_bias)
decoder_layer(input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias,
    cos, sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight,
    mlp_down_bias, current_seq_len)
decoder_layer_split(input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight,
    ln_bias, cos, sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight,
    mlp_down_bias, current_seq_len)
create_graph_context(ctx_id, k_cache, v_cache, weight_qkv, weight_o, mlp_up_weight,
    mlp_down_weight, max_seq_len)
graph_decode_step(ctx_id, input, ln_weight, ln_bias, bias_qkv, bias_o, cos, sin, k_cache, v_cache,
    post_ln_weight, post_ln_bias, mlp_up_bias, mlp_down_bias, current_seq_len)
destroy_graph_context(ctx_id)
"""
MODELS = {
    "pythia_2b8": Sizes(2560, 32, 10240, 20),
    "pythia_6b9": Sizes(4096, 32, 16384, 32),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("signature", re.findall(r"(\w+)\(([^)]*)\)", SIGNATURES))
def test_named_calls(model, signature):
    name, arguments = signature
    function = getattr(clusterfusion, f"{model}_{name}")
    assert f"{model}_{name}" in clusterfusion.__all__
    assert list(inspect.signature(function).parameters) == re.split(r",\s+", arguments)
    assert function.__name__ == f"{model}_{name}"
    sizes = MODELS[model]
    text = inspect.getdoc(function)
    assert "{" not in text
    if name in ("attention_only", "mlp_only", "create_graph_context", "graph_decode_step"):
        assert f"{sizes.hidden}" in text


NAMED_CALLS = [name for name in clusterfusion.__all__ if name.startswith("pythia_")]


@pytest.mark.parametrize(
    "function",
    [getattr(ops, name) for name in ops.__all__]
    + [getattr(clusterfusion, name) for name in NAMED_CALLS],
    ids=lambda function: function.__name__,
)
def test_help_tells_all_arguments(function):
    arguments = inspect.getdoc(function).partition("\nArgs:\n")[2].partition("\n\n")[0]
    names = re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)
    assert names == list(inspect.signature(function).parameters)


def sparse_arrays(sizes: Sizes, max_seq_len: int) -> Arrays:
    """A layer of full size that takes little memory: most rows are zero."""
    random = np.random.default_rng(5)
    arrays = {}
    for name, shape in shapes_of(sizes, max_seq_len).items():
        arrays[name] = np.zeros(shape, np.float32 if name in ("cos", "sin") else np.float16)
        rows = arrays[name][:40]
        rows[...] = random.standard_normal(rows.shape) * 0.1
    return arrays


@pytest.mark.parametrize("model", MODELS)
def test_named_calls_are_the_general_ones(model):
    sizes, position = MODELS[model], 3
    arrays = sparse_arrays(sizes, 8)
    expected = run_parts(arrays, position, sizes)
    layer = ops.decoder_layer(*layer_arguments(arrays), position, **options(sizes))

    def call(name: str, *arguments: Any) -> Any:
        return getattr(clusterfusion, f"{model}_{name}")(*arguments)

    parts = call("attention_only", *attention_arguments(arrays), position)
    down = (arrays["mlp_down_weight"], arrays["mlp_down_bias"])
    output = call("mlp_only", arrays["input"], *parts[:2], *down)
    assert [p.tobytes() for p in (*parts, output)] == [e.tobytes() for e in expected]
    for name in ("decoder_layer", "decoder_layer_split"):
        results = call(name, *layer_arguments(arrays), position)
        assert [r.tobytes() for r in results] == [e.tobytes() for e in layer]


def test_named_calls_know_their_sizes():
    arrays = random_arrays(SMALL, np.float16, 4)
    with pytest.raises(ValueError, match=r"^input: expected shape \[1, 2560\].*found \[1, 64\]"):
        clusterfusion.pythia_2b8_decoder_layer(*layer_arguments(arrays), 2)
    with pytest.raises(ValueError, match=r"^hidden_states: expected shape \[1, 4096\]"):
        clusterfusion.pythia_6b9_mlp_only(*layer_arguments(arrays)[:5])


# ---- graph contexts ----


@pytest.fixture
def small_calls() -> pythia.LayerCalls:
    """The calls of a model of a small size, which has no contexts yet."""
    sizes = pythia.LayerSizes(SMALL.hidden, SMALL.intermediate, SMALL.num_heads, SMALL.rotary_dim)
    return pythia.layer_calls("small", sizes)


KEPT = ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight")
PASSED = (
    *("input", "ln_weight", "ln_bias", "bias_qkv", "bias_o", "cos", "sin", "k_cache", "v_cache"),
    *("post_ln_weight", "post_ln_bias", "mlp_up_bias", "mlp_down_bias"),
)


def pick(arrays: Arrays, names: tuple[str, ...]) -> list[Any]:
    return [arrays[name] for name in names]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_context(small_calls, dtype):
    layers = [random_arrays(SMALL, dtype, 4, seed) for seed in (1, 2)]
    for ctx_id, arrays in enumerate(layers):
        small_calls.create_graph_context(ctx_id, *pick(arrays, KEPT), 4)
    for position in range(4):
        for ctx_id, arrays in enumerate(layers):
            expected = ops.decoder_layer(*layer_arguments(arrays), position, **options(SMALL))
            results = small_calls.graph_decode_step(ctx_id, *pick(arrays, PASSED), position)
            assert [r.tobytes() for r in results] == [e.tobytes() for e in expected]
    for ctx_id in range(2):
        small_calls.destroy_graph_context(ctx_id)


def test_graph_context_takes_a_view_of_its_caches(small_calls):
    arrays = random_arrays(SMALL, np.float16, 4)
    small_calls.create_graph_context(7, *pick(arrays, KEPT), 4)
    views = arrays | {name: arrays[name][:] for name in ("k_cache", "v_cache")}
    small_calls.graph_decode_step(7, *pick(views, PASSED), 0)
    for name in ("k_cache", "v_cache"):
        other = arrays | {name: arrays[name].copy()}
        with pytest.raises(ValueError, match=rf"^{name}: expected the tensor that context 7 was"):
            small_calls.graph_decode_step(7, *pick(other, PASSED), 0)


def test_unknown_context(small_calls):
    arrays = random_arrays(SMALL, np.float16, 4)
    message = r"ctx_id: expected a context of small_create_graph_context \({}\), found 3"
    none, some = message.format("there is none"), message.format("1, 2")
    with pytest.raises(KeyError, match=none):
        small_calls.graph_decode_step(3, *pick(arrays, PASSED), 0)
    with pytest.raises(KeyError, match=none):
        small_calls.destroy_graph_context(3)
    for ctx_id in (2, 1):
        small_calls.create_graph_context(ctx_id, *pick(arrays, KEPT), 4)
    with pytest.raises(KeyError, match=some):
        small_calls.graph_decode_step(3, *pick(arrays, PASSED), 0)
    small_calls.destroy_graph_context(1)
    with pytest.raises(KeyError, match=message.format("2").replace("found 3", "found 1")):
        small_calls.graph_decode_step(1, *pick(arrays, PASSED), 0)
    small_calls.create_graph_context(1, *pick(arrays, KEPT), 4)


def test_wrong_context(small_calls):
    arrays = random_arrays(SMALL, np.float16, 4)
    kept = pick(arrays, KEPT)
    for index, name in enumerate(KEPT):
        for kind, message, value in (
            (TypeError, "expected a tensor, found int", 1),
            (TypeError, "expected dtype float16.*found float32", kept[index].astype(np.float32)),
            (ValueError, "expected", kept[index][..., :-1].copy()),
        ):
            if name == "k_cache" and kind is not ValueError:
                continue  # gives the dtype of all; see below
            wrong = [*kept[:index], value, *kept[index + 1 :]]
            with pytest.raises(kind, match=rf"^{name}: {message}"):
                small_calls.create_graph_context(0, *wrong, 4)
    with pytest.raises(
        TypeError, match=r"^k_cache: expected dtype float16 or bfloat16, found float32"
    ):
        small_calls.create_graph_context(0, kept[0].astype(np.float32), *kept[1:], 4)
    with pytest.raises(ValueError, match=r"^max_seq_len: expected 4, the rows of k_cache, found 3"):
        small_calls.create_graph_context(0, *kept, 3)
    with pytest.raises(TypeError, match=r"^ctx_id: expected an integer, found str"):
        small_calls.create_graph_context("0", *kept, 4)
    small_calls.create_graph_context(0, *kept, 4)
    with pytest.raises(ValueError, match=r"^ctx_id: .*found 0, which has one; destroy it first"):
        small_calls.create_graph_context(0, *kept, 4)


def test_contexts_of_models_are_apart():
    with pytest.raises(KeyError, match="pythia_6b9_create_graph_context"):
        clusterfusion.pythia_6b9_destroy_graph_context(0)
