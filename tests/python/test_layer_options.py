"""The layer calls with options that GPT-NeoX's layer does not need, on NumPy arrays.

Numbers against float64, bits against those of equal calls, errors one by one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from clusterfusion import ops
from layer_options import Kind, ReferenceRows, random_cache, random_layer
from layer_reference import Arrays, bfloat16
from reference_model import relative_error

DTYPES = [
    pytest.param(np.float16, id="float16"),
    pytest.param(
        bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(bfloat16 is None, reason="ml_dtypes is not installed"),
    ),
]
RESULTS = ("output", "k_new", "v_new")
# hidden, num_heads, intermediate, rotary_dim: every head size of Pythia, Llama and relatives, and
# one that is a multiple of nothing.
HEADS = {
    "head_32": (128, 4, 96, 8),
    "head_64": (384, 6, 64, 64),
    "head_80": (320, 4, 40, 20),
    "head_96": (192, 2, 40, 96),
    "head_128": (512, 4, 64, 32),
    "head_256": (512, 2, 64, 64),
    "odd": (66, 6, 17, 4),
}
GROUPED = [
    pytest.param(Kind(h, n, kv, i, r, interleaved), id=f"{name}-{kv}-{interleaved}")
    for name, (h, n, i, r) in HEADS.items()
    for kv in range(1, n + 1)
    if n % kv == 0
    for interleaved in (True, False)
]
SMALL = Kind(64, 4, 2, 96, 8)


def with_caches(kind: Kind, dtype: Any, max_seq_len: int, seed: int = 0) -> Arrays:
    """A layer for one row, with caches of rows."""
    arrays = random_layer(kind, dtype, seed=seed)
    for i, name in enumerate(("k_cache", "v_cache")):
        arrays[name] = random_cache((max_seq_len, kind.kv_size), dtype, seed + i)
    return arrays


def run_layer(arrays: Arrays, position: Any, kind: Kind, **more: Any) -> tuple[Any, ...]:
    return ops.decoder_layer(*arrays.values(), position, **kind.options | more)


def run_parts(arrays: Arrays, position: Any, kind: Kind, **more: Any) -> tuple[Any, ...]:
    """attn_output, mlp_intermediate, k_new, v_new, output, by the two calls for parts."""
    arguments = list(arrays.values())
    results = ops.attention_mlp_up(*arguments[:15], position, **kind.options | more)
    return (*results, ops.mlp_down(arrays["input"], *results[:2], *arguments[15:]))


def bits(results: Any) -> list[bytes]:
    return [result.tobytes() for result in results]


def assert_close(values: np.ndarray, expected: np.ndarray, slack: float = 1e-5) -> None:
    """The error is that of rounding the float64 result once, and float32 sums."""
    assert values.shape == expected.shape
    rounding = relative_error(expected.astype(values.dtype).astype(np.float64), expected)
    assert relative_error(values.astype(np.float64), expected) <= 1.05 * rounding + slack


def assert_results(
    arrays: Arrays, kind: Kind, expected: ReferenceRows, where: Any, **more: Any
) -> None:
    """Whole layer and parts give what is expected, the caches get it and nothing else changes."""
    before = {name: arrays[name].copy() for name in ("k_cache", "v_cache")}
    output, k_new, v_new = run_layer(arrays, where, kind, **more)
    for values, name in zip((output, k_new, v_new), RESULTS, strict=True):
        assert_close(values, getattr(expected, name))
    for name, wide in zip(before, expected.caches, strict=True):
        wide = wide.reshape(before[name].shape)
        changed = arrays[name].astype(np.float64) != before[name].astype(np.float64)
        assert changed.sum() > 0
        written = wide != before[name].astype(np.float64)
        assert not (changed & ~written).any()
        assert_close(arrays[name], wide)
    parts = run_parts(arrays, where, kind, **more)
    assert bits(parts[2:4]) == bits((k_new, v_new))
    assert_close(parts[0], expected.attn_output)
    assert_close(parts[1].reshape(expected.mlp_intermediate.shape), expected.mlp_intermediate)


# ---- grouped heads ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_heads(kind, dtype):
    arrays = with_caches(kind, dtype, 200)
    for position in (0, 1, 63, 64, 199):
        expected = ReferenceRows(arrays, kind, [position])
        assert_results(arrays, kind, expected, position)


def test_ungrouped_heads_are_the_usual_layer():
    kind = dataclasses.replace(SMALL, num_kv_heads=4)
    arrays = with_caches(kind, np.float16, 8)
    usual = {"num_heads": 4, "rotary_dim": 8}
    expected = ops.decoder_layer(*arrays.values(), 5, **usual)
    assert bits(run_layer(arrays, 5, kind)) == bits(expected)
    assert bits(ops.decoder_layer(*arrays.values(), 5, **usual, num_kv_heads=4)) == bits(expected)
    parts = ops.attention_mlp_up(*list(arrays.values())[:15], 5, **usual)
    assert bits(run_parts(arrays, 5, kind)[:4]) == bits(parts)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_orders_of_rows_give_the_same_bits(num_kv_heads):
    kind = dataclasses.replace(SMALL, num_kv_heads=num_kv_heads)
    arrays = with_caches(kind, np.float16, 8)
    expected = run_layer(arrays, 5, kind)
    rows = np.arange(kind.q_size + 2 * kind.kv_size)
    rows = rows.reshape(num_kv_heads, kind.group + 2, kind.size_of_head)
    parts = (rows[:, : kind.group], rows[:, kind.group], rows[:, kind.group + 1])
    order = np.concatenate([part.reshape(-1) for part in parts])
    arrays["weight_qkv"] = arrays["weight_qkv"][order]
    arrays["bias_qkv"] = arrays["bias_qkv"][order]
    apart = dataclasses.replace(kind, qkv_weight_interleaved=False)
    assert bits(run_layer(arrays, 5, apart)) == bits(expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_grouped_heads_without_biases(interleaved):
    kind = dataclasses.replace(SMALL, qkv_weight_interleaved=interleaved)
    arrays = with_caches(kind, np.float16, 8) | {"bias_qkv": None, "bias_o": None}
    assert_results(arrays, kind, ReferenceRows(arrays, kind, [5]), 5)


def test_out_of_grouped_heads():
    arrays = with_caches(SMALL, np.float16, 8)
    expected = run_layer(arrays, 5, SMALL)
    out = tuple(np.full_like(result, np.nan) for result in expected)
    assert all(a is b for a, b in zip(run_layer(arrays, 5, SMALL, out=out), out, strict=True))
    assert bits(out) == bits(expected)


# ---- errors ----


def refuse(
    kind: type[Exception], message: str, change: dict[str, Any] | None = None, **more: Any
) -> None:
    """The call and its first half raise, with all of `message`, and leave the caches alone."""
    arrays = with_caches(SMALL, np.float16, 8)
    for name, value in (change or {}).items():
        arrays[name] = value(arrays[name]) if callable(value) else value
    position = more.pop("position", 5)
    before = bits((arrays["k_cache"], arrays["v_cache"]))
    with pytest.raises(kind, match=message):
        run_layer(arrays, position, SMALL, **more)
    with pytest.raises(kind, match=message):
        run_parts(arrays, position, SMALL, **more)
    assert bits((arrays["k_cache"], arrays["v_cache"])) == before


@pytest.mark.parametrize(
    ("option", "value", "kind", "message"),
    [
        ("num_kv_heads", 0, ValueError, r"expected a divisor of num_heads \(4\), found 0"),
        ("num_kv_heads", -2, ValueError, r"found -2"),
        ("num_kv_heads", 3, ValueError, r"found 3"),
        ("num_kv_heads", 8, ValueError, r"found 8"),
        ("num_kv_heads", 2**62, ValueError, r"found 4611686018427387904"),
        ("num_kv_heads", 2.0, TypeError, r"expected an integer or None, found float"),
        ("num_kv_heads", True, TypeError, r"expected an integer or None, found bool"),
        ("qkv_weight_interleaved", 1, TypeError, r"expected bool, found int"),
        ("qkv_weight_interleaved", None, TypeError, r"expected bool, found None"),
    ],
)
def test_wrong_option(option, value, kind, message):
    refuse(kind, rf"^{option}: .*{message}", **{option: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight_qkv", r"\[128, 64\] \(\(num_heads \+ 2 num_kv_heads\) head_dim, hidden\)"),
        ("bias_qkv", r"\[128\]"),
        ("k_cache", r"\[8, 32\] \(max_seq_len, num_kv_heads head_dim\)"),
        ("v_cache", r"\[8, 32\]"),
    ],
)
def test_shapes_of_ungrouped_heads(name, message):
    """What a caller has who forgot that heads are grouped."""

    def twice(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, array], axis=-1 if name.endswith("cache") else 0)

    refuse(ValueError, rf"^{name}: expected shape {message}.*found \[", {name: twice})


def test_results_of_ungrouped_heads():
    arrays = with_caches(SMALL, np.float16, 8)
    output, k_new, v_new = run_layer(arrays, 5, SMALL)
    wrong = np.concatenate([k_new, k_new], axis=1)
    message = (
        r"^k_new: expected shape \[1, 2, 16\] \(1, num_kv_heads, head_dim\), found \[1, 4, 16\]"
    )
    with pytest.raises(ValueError, match=message):
        run_layer(arrays, 5, SMALL, out=(output, wrong, v_new))
