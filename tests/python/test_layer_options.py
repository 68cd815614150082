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


# ---- pages ----

PAGED = [
    pytest.param(Kind(h, n, kv, i, r, interleaved), size, id=f"{name}-{kv}-{size}")
    for name, (h, n, i, r) in HEADS.items()
    for kv, interleaved, size in ((1, True, 16), (n // 2, False, 32), (n, True, 64))
]
PAGED_SMALL = dataclasses.replace(SMALL, qkv_weight_interleaved=False)


def interleaved_views(kind: Kind, dtype: Any, pages: int, page_size: int, order: str) -> Any:
    """Keys and values as views of one allocation, by the order of its dimensions.

    p: pages, c: keys or values, s: positions of a page, h: heads, d: values of a head.
    """
    sizes = {"p": pages, "c": 2, "s": page_size, "h": kind.num_kv_heads, "d": kind.size_of_head}
    both = random_cache(tuple(sizes[letter] for letter in order), dtype)
    return both.transpose([order.index(letter) for letter in "cpshd"])


def paged_layer(
    kind: Kind, dtype: Any, positions: list[int], page_size: int, order: str = "pcshd"
) -> tuple[Arrays, np.ndarray]:
    """A layer for rows with these positions, whose pages lie anywhere, and its block table."""
    rows, width = len(positions), max(positions) // page_size + 2
    random = np.random.default_rng(rows)
    arrays = random_layer(kind, dtype, rows)
    pages = rows * width + 3
    table = random.permutation(pages)[: rows * width].reshape(rows, width).astype(np.int32)
    for row, position in enumerate(positions):  # what is behind a row's pages is never looked at
        table[row, position // page_size + 1 :] = random.choice([-1, pages, 2**31 - 1, -(2**31)])
    views = interleaved_views(kind, dtype, pages, page_size, order)
    return arrays | {"k_cache": views[0], "v_cache": views[1]}, table


def where(positions: list[int], table: np.ndarray) -> dict[str, Any]:
    return {"positions": np.array(positions, np.int32), "block_table": table}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "page_size"), PAGED)
def test_pages(kind, page_size, dtype):
    positions = [0, 2 * page_size - 1, 2 * page_size, 75]
    arrays, table = paged_layer(kind, dtype, positions, page_size)
    expected = ReferenceRows(arrays, kind, positions, table)
    assert_results(arrays, kind, expected, None, **where(positions, table))


@pytest.mark.parametrize("rows", range(1, 17))
def test_rows(rows, down_streams=False):
    """Each has the bits that it has alone, and alone in caches of rows.

    Except what `mlp_down` gives where it streams one row, and sums otherwise (`down_streams`): that
    is the same in any company.
    """
    positions = np.random.default_rng(rows).integers(0, 100, rows).tolist()
    arrays, table = paged_layer(PAGED_SMALL, np.float16, positions, 16)
    expected = ReferenceRows(arrays, PAGED_SMALL, positions, table)
    assert_results(arrays, PAGED_SMALL, expected, None, **where(positions, table))
    together = run_layer(arrays, None, PAGED_SMALL, **where(positions, table))
    parts = run_parts(arrays, None, PAGED_SMALL, **where(positions, table))
    assert [part.shape[0] for part in parts] == [rows] * 5
    heads = (-1, PAGED_SMALL.kv_size)
    for row, position in enumerate(positions):
        one = arrays | {name: arrays[name][row : row + 1] for name in ("input", "cos", "sin")}
        at = where([position], table[row : row + 1])
        mine = [part[row : row + 1] for part in together]
        assert bits(run_layer(one, None, PAGED_SMALL, **at)) == bits(mine)
        mine = [part[row : row + 1] for part in parts]
        alone = run_parts(one, None, PAGED_SMALL, **at)
        assert bits(alone[:-1]) == bits(mine[:-1])
        if down_streams:
            both = [row, (row + 1) % rows]
            two = arrays | {name: arrays[name][both] for name in ("input", "cos", "sin")}
            pair = run_parts(
                two, None, PAGED_SMALL, **where([positions[i] for i in both], table[both])
            )
            assert bits(part[:1] for part in pair) == bits(mine)
            assert relative_error(alone[-1].astype(np.float64), mine[-1].astype(np.float64)) < 1e-3
        else:
            assert bits(alone[-1:]) == bits(mine[-1:])
        pages = table[row, : position // 16 + 1]
        caches = {name: arrays[name][pages].reshape(heads) for name in ("k_cache", "v_cache")}
        in_rows = run_layer(one | caches, position, PAGED_SMALL)
        assert bits(in_rows) == bits(part[row : row + 1] for part in together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["cpshd", "pcshd", "pschd", "pshcd", "pchsd", "hcpsd", "phscd"])
def test_views_of_one_allocation(order, dtype):
    positions = [3, 40, 16]
    plain, table = paged_layer(PAGED_SMALL, dtype, positions, 16)
    plain = plain | {name: plain[name].copy() for name in ("k_cache", "v_cache")}
    arrays, _ = paged_layer(PAGED_SMALL, dtype, positions, 16, order)
    for name in ("k_cache", "v_cache"):
        arrays[name][...] = plain[name]
    expected = run_layer(plain, None, PAGED_SMALL, **where(positions, table))
    results = run_layer(arrays, None, PAGED_SMALL, **where(positions, table))
    assert bits(results) == bits(expected)
    for name in ("k_cache", "v_cache"):
        assert arrays[name].tobytes() == plain[name].tobytes()


def test_one_position_for_all_rows():
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [20] * 3, 16)
    expected = run_layer(arrays, None, PAGED_SMALL, **where([20] * 3, table))
    for more in ({"positions": 20}, {"positions": np.int64(20)}, {"position": 20}):
        position = more.pop("position", None)
        results = run_layer(arrays, position, PAGED_SMALL, block_table=table, **more)
        assert bits(results) == bits(expected)


def test_positions_of_one_row_without_pages():
    arrays = with_caches(SMALL, np.float16, 8)
    expected = run_layer(arrays, 5, SMALL)
    for position in (5, np.array(5, np.int32), np.array([5], np.int32)):
        assert bits(run_layer(arrays, None, SMALL, positions=position)) == bits(expected)


def test_table_of_rows_that_lie_apart():
    positions = [3, 40, 16]
    arrays, table = paged_layer(PAGED_SMALL, np.float16, positions, 16)
    expected = run_layer(arrays, None, PAGED_SMALL, **where(positions, table))
    wide = np.full((3, 9), -1, np.int32)
    wide[:, : table.shape[1]] = table
    view = wide[:, : table.shape[1]]
    assert bits(run_layer(arrays, None, PAGED_SMALL, **where(positions, view))) == bits(expected)


def test_tokens_of_one_sequence():
    """Rows that follow each other in one sequence: as if they had come one after the other."""
    positions = [14, 15, 16, 17, 18]
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [18], 16)
    one = random_layer(PAGED_SMALL, np.float16, 5)
    arrays |= {name: one[name] for name in ("input", "cos", "sin")}
    tables = np.repeat(table, 5, axis=0)
    serial = arrays | {name: arrays[name].copy() for name in ("k_cache", "v_cache")}
    together = run_layer(arrays, None, PAGED_SMALL, **where(positions, tables))
    for row, position in enumerate(positions):
        token = serial | {name: serial[name][row : row + 1] for name in ("input", "cos", "sin")}
        results = run_layer(token, position, PAGED_SMALL, block_table=table)
        assert bits(results) == bits(part[row : row + 1] for part in together)
    # The same place for all rows, one stride 0 in the table.
    broadcast = np.broadcast_to(table, (5, table.shape[1]))
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        again = run_layer(arrays, None, PAGED_SMALL, **where(positions, broadcast))
        assert bits(again) == bits(together)


@pytest.mark.parametrize(
    ("position", "page"),
    [(-1, 0), (48, 0), (2**31 - 1, 0), (-(2**31), 0), (20, -1), (20, 9), (20, 2**31 - 1)],
)
@pytest.mark.parametrize("first", [True, False])
def test_rows_outside(position, page, first):
    """NaN in all results of the row, no write, and the other rows do not notice."""
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [5, 20, 33], 16)
    table = np.where(table == table.max(), 0, table)[:, :3].copy()  # 9 pages and some
    pages = arrays["k_cache"].shape[0]
    expected = run_layer(arrays, None, PAGED_SMALL, **where([5, 20, 33], table))
    untouched = {name: arrays[name].copy() for name in ("k_cache", "v_cache")}
    if page != 0:
        table[1, 0 if first else 1] = pages if page == 9 else page
    results = run_layer(arrays, None, PAGED_SMALL, **where([5, position, 33], table))
    parts = run_parts(arrays, None, PAGED_SMALL, **where([5, position, 33], table))
    for values in (*results, *parts):
        assert np.isnan(values[1].astype(np.float64)).all()
        assert np.isfinite(values[[0, 2]].astype(np.float64)).all()
    for values, good in zip(results, expected, strict=True):
        assert values[[0, 2]].tobytes() == good[[0, 2]].tobytes()
    for name, before in untouched.items():
        assert arrays[name].tobytes() == before.tobytes()


def test_rows_that_are_all_outside():
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [5, 20], 16)
    before = bits((arrays["k_cache"], arrays["v_cache"]))
    results = run_layer(arrays, None, PAGED_SMALL, **where([-1, -1], table))
    assert all(np.isnan(result.astype(np.float64)).all() for result in results)
    assert bits((arrays["k_cache"], arrays["v_cache"])) == before


def test_mlp_down_of_rows():
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [5, 20, 33], 16)
    *parts, output = run_parts(arrays, None, PAGED_SMALL, **where([5, 20, 33], table))
    down = (arrays["mlp_down_weight"], arrays["mlp_down_bias"])
    out = np.full_like(output, np.nan)
    assert ops.mlp_down(arrays["input"][None], parts[0], parts[1], *down, out=out) is out
    assert out.tobytes() == output.tobytes()
    for name, index in (("attn_output", 0), ("mlp_intermediate", 1)):
        wrong = [*parts[:2]]
        wrong[index] = wrong[index][:2]
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \[3, .*found \[2, "):
            ops.mlp_down(arrays["input"], *wrong, *down)
    many = [np.zeros((17, n), np.float16) for n in (64, 64, 96)]
    with pytest.raises(ValueError, match=r"^hidden_states: expected 1 to 16 rows, found shape"):
        ops.mlp_down(*many, *down)


def refuse_pages(
    kind: type[Exception], message: str, change: dict[str, Any] | None = None, **more: Any
) -> None:
    """As refuse(), of three rows with pages."""
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [5, 20, 33], 16)
    arrays |= {name: value(arrays[name]) for name, value in (change or {}).items()}
    before = bits((arrays["k_cache"], arrays["v_cache"]))
    options = where([5, 20, 33], table) | more
    with pytest.raises(kind, match=message):
        run_layer(arrays, None, PAGED_SMALL, **options)
    with pytest.raises(kind, match=message):
        run_parts(arrays, None, PAGED_SMALL, **options)
    assert bits((arrays["k_cache"], arrays["v_cache"])) == before


def test_pages_without_a_table():
    pages = {n: lambda a: np.zeros((2, 16, 2, 16), np.float16) for n in ("k_cache", "v_cache")}
    message = (
        r"^k_cache: expected shape \[max_seq_len, 32\], because caches in pages need a block_table,"
        r" found \[2, 16, 2, 16\]$"
    )
    refuse(ValueError, message, pages)


PAGE_ERRORS = {
    "three dimensions": (r"^k_cache: expected shape \[pages, page_size, 2, 16\]", lambda a: a[0]),
    "page size": (r"^k_cache: expected pages of 16, 32 or 64", lambda a: a[:, :8]),
    "heads": (r"^k_cache: expected shape .*found \[.*, 1, 16\]", lambda a: a[:, :, :1]),
    "head_dim": (r"^k_cache: expected shape .*found \[.*, 8\]", lambda a: a[..., :8]),
    "no pages": (r"^k_cache: expected shape", lambda a: a[:0]),
    "reversed": (r"^k_cache: expected a last dimension without .*found strides", lambda a: a[::-1]),
    "gaps": (
        r"^k_cache: expected a last dimension without gaps",
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    ),
    "one page for all": (
        r"^k_cache: expected a last dimension without gaps",
        lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0, *a.strides[1:])),
    ),
    "other strides": (r"^v_cache: expected the strides of k_cache, which are 512 ", np.copy),
    "address": (
        r"^k_cache: expected an address that is a multiple of 16 bytes",
        lambda a: np.zeros((*a.shape[:-1], 24), np.float16)[..., 1:17],
    ),
}


@pytest.mark.parametrize("name", PAGE_ERRORS)
def test_wrong_pages(name):
    message, change = PAGE_ERRORS[name]
    refuse_pages(ValueError, message, {"k_cache": change})


def test_wrong_type_of_pages():
    for name in ("k_cache", "v_cache"):
        message = rf"^{name}: expected dtype float16.*found float32"
        refuse_pages(TypeError, message, {name: lambda a: a.astype(np.float32)})


@pytest.mark.parametrize("shift", [0, 1, 15])
def test_overlapping_pages(shift):
    """Views of one allocation whose values begin so many positions behind the keys."""
    arrays, table = paged_layer(PAGED_SMALL, np.float16, [5], 16)
    pages, page_size, heads, dim = arrays["k_cache"].shape
    memory = np.zeros((pages + 1) * 2 * page_size * heads * dim, np.float16)
    strides = tuple(2 * n for n in (2 * page_size * heads * dim, heads * dim, dim, 1))
    for name, first in (("k_cache", 0), ("v_cache", shift * heads * dim)):
        arrays[name] = np.lib.stride_tricks.as_strided(
            memory[first:], (pages, page_size, heads, dim), strides
        )
    with pytest.raises(ValueError, match=r"^k_cache: expected memory .*overlaps v_cache$"):
        run_layer(arrays, None, PAGED_SMALL, **where([5], table))


@pytest.mark.parametrize(
    ("option", "value", "kind", "message"),
    [
        ("positions", -1, ValueError, r"expected 0 to 63, because block_table has 4 pages of 16"),
        ("positions", 64, ValueError, r"found 64"),
        ("positions", 2**70, TypeError, r"found int of more than 64 bits"),
        ("positions", 1.0, TypeError, r"expected an integer or an int32 tensor, found float"),
        ("positions", [1, 2, 3], TypeError, r"found list or tuple"),
        ("positions", np.zeros(2, np.int32), ValueError, r"expected shape \[3\].*found \[2\]"),
        ("positions", np.array(1, np.int32), ValueError, r"expected shape \[3\]"),
        ("positions", np.zeros(3, np.int64), TypeError, r"expected dtype int32, found int64"),
        ("block_table", 3, TypeError, r"expected a tensor, found int"),
        ("block_table", np.zeros(3, np.int32), ValueError, r"expected shape \[3, max_pages\]"),
        ("block_table", np.zeros((3, 0), np.int32), ValueError, r"expected shape \[3, max_pages\]"),
        ("block_table", np.zeros((2, 4), np.int32), ValueError, r"expected shape \[3, 4\]"),
        ("block_table", np.zeros((3, 4), np.int64), TypeError, r"expected dtype int32"),
        ("block_table", np.zeros((3, 8), np.int32)[:, ::2], ValueError, r"rows without gaps"),
    ],
)
def test_wrong_table_or_positions(option, value, kind, message):
    refuse_pages(kind, rf"^{option}: .*{message}", **{option: value})


def test_two_rows_in_one_place():
    _, table = paged_layer(PAGED_SMALL, np.float16, [5, 20, 33], 16)
    message = (
        r"^block_table: expected a place of its own for the new key and value of each row, found "
        rf"that rows 0 and 2 both write to position 5 of page {table[0, 0]}$"
    )
    table[2, 1] = table[0, 0]
    refuse_pages(ValueError, message, block_table=table, positions=np.array([5, 20, 21], np.int32))


def test_wrong_rows():
    message = r"^input: expected 1 to 16 rows, found shape \[17, 64\]"
    refuse_pages(ValueError, message, {"input": lambda a: np.zeros((17, 64), np.float16)})
    message = r"^cos: expected shape \[3, 8\] \(rows, rotary_dim\), found \[1, 8\]"
    refuse_pages(ValueError, message, {"cos": lambda a: a[:1]})
    message = r"^block_table: expected shape \[2, 4\]"
    refuse_pages(ValueError, message, {n: lambda a: a[:2] for n in ("input", "cos", "sin")})
    message = r"^input: expected shape \[rows, 64\], or \[1, rows, 64\], found \[3, 1, 64\]$"
    refuse_pages(ValueError, message, {"input": lambda a: a[:, None]})
    with pytest.raises(ValueError, match=message.replace("input", "hidden_states")):
        ops.mlp_down(*(np.zeros((3, 1, n), np.float16) for n in (64, 64, 96)), None, None)
    message = r"^input: expected shape \[1, 64\] .*because several rows need a block_table"
    refuse(ValueError, message, {"input": lambda a: np.concatenate([a, a])})


def test_one_of_two_positions():
    arrays = with_caches(SMALL, np.float16, 8)
    with pytest.raises(TypeError, match=r"^positions: expected None beside current_seq_len"):
        run_layer(arrays, 5, SMALL, positions=5)
    with pytest.raises(TypeError, match=r"^current_seq_len: expected .* found None$"):
        run_layer(arrays, None, SMALL)
    with pytest.raises(ValueError, match=r"^positions: expected 0 to 7, found 8: .* are full$"):
        run_layer(arrays, None, SMALL, positions=8)


# ---- layers of other families ----

LLAMA = {
    "qkv_weight_interleaved": False,
    "norm": "rms",
    "gated": True,
    "parallel_residual": False,
    "activation": "silu",
}
# Small layers with the proportions of models: hidden, num_heads, num_kv_heads, intermediate,
# rotary_dim; which biases they have.
FAMILIES = {
    "llama": (Kind(256, 4, 1, 448, 64, layer_norm_eps=1e-5, **LLAMA), ()),
    "smollm2": (Kind(192, 3, 1, 512, 64, layer_norm_eps=1e-5, **LLAMA), ()),
    "mistral_nemo": (Kind(160, 4, 2, 96, 32, head_dim=32, **LLAMA), ()),
    "qwen2": (Kind(128, 4, 2, 64, 32, layer_norm_eps=1e-6, **LLAMA), ("bias_qkv",)),
    "qwen3": (Kind(64, 4, 2, 96, 128, head_dim=128, layer_norm_eps=1e-6, **LLAMA), ()),
    "all_biases": (Kind(64, 4, 4, 96, 16, **LLAMA), ("bias_qkv", "bias_o", "mlp")),
    "odd": (Kind(35, 3, 3, 17, 6, head_dim=11, **LLAMA), ()),
}
PARTS = {
    "rms": {"norm": "rms"},
    "gated": {"gated": True},
    "sequential": {"parallel_residual": False},
    "gated_relu": {"gated": True, "activation": "relu"},
    "sequential_gated": {"parallel_residual": False, "gated": True},
    "rms_sequential": {"norm": "rms", "parallel_residual": False},
    "head_dim": {"head_dim": 24},
}


def without_biases(arrays: Arrays, kept: tuple[str, ...]) -> Arrays:
    """Norms have theirs or not by their kind."""
    missing = [name for name in ("bias_qkv", "bias_o") if name not in kept]
    missing += [] if "mlp" in kept else ["mlp_up_bias", "mlp_down_bias"]
    return arrays | dict.fromkeys(missing)


def head_norms(kind: Kind, dtype: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    shape = (2, kind.size_of_head)
    weights = (1 + 0.2 * random.standard_normal(shape)).astype(np.float32).astype(dtype)
    return {"q_norm_weight": weights[0].copy(), "k_norm_weight": weights[1].copy()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, dtype):
    kind, biases = FAMILIES[family]
    more = head_norms(kind, dtype) if family == "qwen3" else {}
    norms = tuple(more.values()) or None
    arrays = without_biases(with_caches(kind, dtype, 70), biases)
    for position in (0, 69):
        expected = ReferenceRows(arrays, kind, [position], head_norms=norms)
        assert_results(arrays, kind, expected, position, **more)
    positions = [0, 31, 64]
    arrays, table = paged_layer(kind, dtype, positions, 32)
    arrays = without_biases(arrays, biases)
    expected = ReferenceRows(arrays, kind, positions, table, norms)
    assert_results(arrays, kind, expected, None, **where(positions, table), **more)


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_other_layers(part):
    """Each option alone, on GPT-NeoX's layer."""
    kind = dataclasses.replace(SMALL, **PARTS[part])
    arrays = with_caches(kind, np.float16, 8)
    expected = ReferenceRows(arrays, kind, [5])
    assert_results(arrays, kind, expected, 5)
    *parts, output = run_parts(arrays, 5, kind)
    wide = {name: arrays[name].astype(np.float64) for name in ("input", "mlp_down_weight")}
    down = wide["mlp_down_weight"] @ parts[1].astype(np.float64)
    down += arrays["mlp_down_bias"].astype(np.float64)
    assert_close(output, wide["input"] + parts[0].astype(np.float64) + down)


@pytest.mark.parametrize("name", ["mlp_up_bias", "mlp_down_bias"])
def test_without_a_bias_of_the_mlp(name):
    arrays = with_caches(SMALL, np.float16, 8)
    zero = arrays | {name: np.zeros_like(arrays[name])}
    for run in (run_layer, run_parts):
        assert bits(run(arrays | {name: None}, 5, SMALL)) == bits(run(zero, 5, SMALL))
    usual = {"num_heads": 4, "rotary_dim": 8}
    arrays = with_caches(dataclasses.replace(SMALL, num_kv_heads=4), np.float16, 8)
    zero = arrays | {name: np.zeros_like(arrays[name])}
    arrays[name] = None
    results = [ops.decoder_layer(*each.values(), 5, **usual) for each in (arrays, zero)]
    assert bits(results[0]) == bits(results[1])


def test_named_head_dim_is_the_usual_one():
    arrays = with_caches(SMALL, np.float16, 8)
    assert bits(run_layer(arrays, 5, SMALL, head_dim=16)) == bits(run_layer(arrays, 5, SMALL))


@pytest.mark.parametrize("seed", range(24))
def test_random_layers(seed):
    """Any options together, in shapes that are multiples of nothing."""
    random = np.random.default_rng(seed)
    num_kv_heads, head_dim = int(random.integers(1, 5)), int(random.integers(2, 40))
    kind = Kind(
        hidden=int(random.integers(3, 150)),
        num_heads=num_kv_heads * int(random.integers(1, 5)),
        num_kv_heads=num_kv_heads,
        intermediate=int(random.integers(1, 200)),
        rotary_dim=2 * int(random.integers(0, head_dim // 2 + 1)),
        head_dim=head_dim,
        qkv_weight_interleaved=bool(random.integers(2)),
        norm=["layer", "rms"][random.integers(2)],
        gated=bool(random.integers(2)),
        parallel_residual=bool(random.integers(2)),
        activation=["gelu", "silu", "relu"][random.integers(3)],
    )
    page_size = int(random.choice([16, 32, 64]))
    positions = random.integers(0, 150, int(random.integers(1, 17))).tolist()
    more = head_norms(kind, np.float16) if random.integers(2) else {}
    names = ("bias_qkv", "bias_o", "mlp")
    kept = tuple(name for name in names if random.integers(2))
    arrays, table = paged_layer(kind, np.float16, positions, page_size, "cpshd")
    arrays = without_biases(arrays, kept)
    expected = ReferenceRows(arrays, kind, positions, table, tuple(more.values()) or None)
    assert_results(arrays, kind, expected, None, **where(positions, table), **more)


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
        ("head_dim", 0, ValueError, r"expected 1 to 65536, found 0"),
        ("head_dim", 2**62, ValueError, r"expected 1 to 65536, found 4611686018427387904"),
        ("head_dim", 1.0, TypeError, r"expected an integer or None, found float"),
        ("norm", "layer_norm", ValueError, r'expected "layer" or "rms", found "layer_norm"'),
        ("norm", None, TypeError, r"expected str, found None"),
        ("gated", 1, TypeError, r"expected bool, found int"),
        ("parallel_residual", 0, TypeError, r"expected bool, found int"),
        ("q_norm_weight", 3, TypeError, r"expected a tensor, found int"),
        ("k_norm_weight", "x", TypeError, r"expected a tensor, found str"),
        ("qkv_weight_interleaved", 1, TypeError, r"expected bool, found int"),
        ("qkv_weight_interleaved", None, TypeError, r"expected bool, found None"),
    ],
)
def test_wrong_option(option, value, kind, message):
    refuse(kind, rf"^{option}: .*{message}", **{option: value})


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_without_dimensions(dtype):
    arrays = with_caches(SMALL, dtype, 8)
    for name, array in arrays.items():
        wrong = arrays | {name: np.zeros((), array.dtype)}
        with pytest.raises(ValueError, match=rf"^{name}: expected .*shape.*found \[\]"):
            run_layer(wrong, 5, SMALL)


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


def test_wrong_head_norms():
    good, wrong = np.ones(16, np.float16), np.ones(15, np.float16)
    for one, other in (("q_norm_weight", "k_norm_weight"), ("k_norm_weight", "q_norm_weight")):
        refuse(TypeError, rf"^{other}: expected a tensor, found none$", **{one: good})
        message = rf"^{one}: expected shape \[16\] \(head_dim\), found \[15\]"
        refuse(ValueError, message, **{one: wrong, other: good})


def test_biases_beside_norms():
    """A LayerNorm has one, an RMSNorm has none."""
    missing = {"ln_bias": None, "post_ln_bias": None}
    refuse(TypeError, r"^ln_bias: expected a tensor, found none$", missing)
    message = r"^ln_bias: expected None, because an RMSNorm has no bias, found a tensor$"
    refuse(ValueError, message, norm="rms")
    message = r"^post_ln_bias: expected None, because an RMSNorm has no bias, found a tensor$"
    refuse(ValueError, message, {"ln_bias": None}, norm="rms")


def test_rows_of_a_gate():
    message = r"^mlp_up_weight: expected an even number of rows.*because gated is True, found shape"
    refuse(ValueError, message, {"mlp_up_weight": lambda a: a[:95]}, gated=True)
    message = r"^mlp_down_weight: expected shape \[64, 48\].*found \[64, 96\]"
    arrays = with_caches(SMALL, np.float16, 8)
    with pytest.raises(ValueError, match=message):
        run_layer(arrays, 5, SMALL, gated=True)


def test_num_heads_beside_head_dim():
    message = r"^num_heads: expected 1 to 65536, found 0"
    refuse(ValueError, message, num_heads=0, head_dim=16)
    message = (
        r"^weight_o: expected shape \[64, 96\] \(hidden, num_heads head_dim\), found \[64, 64\]"
    )
    arrays = with_caches(SMALL, np.float16, 8)
    rows = 4 * 24 + 2 * 2 * 24
    arrays |= {"weight_qkv": np.zeros((rows, 64), np.float16), "bias_qkv": None}
    with pytest.raises(ValueError, match=message):
        run_layer(arrays, 5, SMALL, head_dim=24)
