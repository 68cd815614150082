"""The layer calls with options, on torch tensors: beside PyTorch's own layers, and as operators.

On the CPU, or on the device that CLUSTERFUSION_TEST_DEVICE names.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from clusterfusion import ops
from layer_options import Kind, random_layer
from test_layer_options import FAMILIES, LLAMA, head_norms, paged_layer, without_biases

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional
if not hasattr(torch.ops.clusterfusion, "decoder_layer"):
    pytest.skip("this torch has no torch.library.custom_op", allow_module_level=True)

DEVICE = torch.device(os.environ.get("CLUSTERFUSION_TEST_DEVICE", "cpu"))
Tensors = dict[str, Any]
POSITIONS = [0, 31, 64]
KINDS = {
    "llama": FAMILIES["llama"][0],
    "qwen2": FAMILIES["qwen2"][0],
    "interleaved": Kind(128, 4, 2, 96, 8),
    "multi_query": Kind(512, 4, 1, 64, 32, activation="gelu_pytorch_tanh"),
}


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def to_torch(array: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor | None:
    if array is None:
        return None
    tensor = torch.from_numpy(array.astype(np.float32)).to(DEVICE)
    return tensor if array.dtype == np.float32 else tensor.to(dtype)


def torch_layer(
    kind: Kind, dtype: torch.dtype, order: str = "pcshd"
) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a layer for rows at POSITIONS, whose caches are views of one, and their table."""
    arrays, table = paged_layer(kind, np.float16, POSITIONS, 32, order)
    tensors = {n: to_torch(a, dtype) for n, a in arrays.items() if not n.endswith("cache")}
    both = np.stack([arrays["k_cache"], arrays["v_cache"]], axis=1)
    k_cache, v_cache = to_torch(both, dtype).unbind(1)
    names = list(tensors)
    values = [*list(tensors.values())[:5], k_cache, v_cache, *list(tensors.values())[5:]]
    return (
        dict(zip((*names[:5], "k_cache", "v_cache", *names[5:]), values, strict=True)),
        torch.from_numpy(table).to(DEVICE),
    )


def positions_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def where(table: torch.Tensor) -> Tensors:
    return {"positions": positions_of(POSITIONS), "block_table": table}


def run(tensors: Tensors, kind: Kind, **more: Any) -> tuple[torch.Tensor, ...]:
    return ops.decoder_layer(*tensors.values(), **kind.options | more)


def rotate(heads: torch.Tensor, t: Tensors, kind: Kind) -> torch.Tensor:
    """Of [rows, heads, head_dim]."""
    turned, rest = heads[..., : kind.rotary_dim].float(), heads[..., kind.rotary_dim :]
    low, high = turned.chunk(2, -1)
    other = torch.cat([-high, low], -1)
    result = turned * t["cos"][:, None] + other * t["sin"][:, None]
    return torch.cat([result.to(heads.dtype), rest], -1)


def norm(x: torch.Tensor, t: Tensors, name: str, kind: Kind) -> torch.Tensor:
    weight, size = t[f"{name}_weight"], (kind.hidden,)
    if kind.norm == "rms":
        return F.rms_norm(x, size, weight, kind.layer_norm_eps)
    return F.layer_norm(x, size, weight, t[f"{name}_bias"], kind.layer_norm_eps)


def run_torch(t: Tensors, table: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, ...]:
    """The same by functional layers and scaled_dot_product_attention."""
    x, rows, dim = t["input"], len(POSITIONS), kind.size_of_head
    qkv = F.linear(norm(x, t, "ln", kind), t["weight_qkv"], t["bias_qkv"])
    if kind.qkv_weight_interleaved:
        parts = qkv.view(rows, kind.num_kv_heads, kind.group + 2, dim)
        parts = parts.split([kind.group, 1, 1], 2)
    else:
        parts = qkv.split([kind.q_size, kind.kv_size, kind.kv_size], 1)
    q, k_new, v_new = (part.reshape(rows, -1, dim) for part in parts)
    q, k_new = rotate(q, t, kind), rotate(k_new, t, kind)
    attended = []
    for row, position in enumerate(POSITIONS):
        pages = table[row, : position // 32 + 1].long()
        keys, values = (t[n][pages].flatten(0, 1)[:position] for n in ("k_cache", "v_cache"))
        keys = torch.cat([keys, k_new[row : row + 1]]).transpose(0, 1)[None]
        values = torch.cat([values, v_new[row : row + 1]]).transpose(0, 1)[None]
        query = q[row].unsqueeze(1)[None]
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        attended.append(out.reshape(-1))
    attention = F.linear(torch.stack(attended), t["weight_o"], t["bias_o"])
    between = x if kind.parallel_residual else x + attention
    up = F.linear(norm(between, t, "post_ln", kind), t["mlp_up_weight"], t["mlp_up_bias"])
    if kind.gated:
        gate, up = up.chunk(2, -1)
        up = F.silu(gate) * up
    else:
        up = F.gelu(up, approximate="tanh" if "tanh" in kind.activation else "none")
    down = F.linear(up, t["mlp_down_weight"], t["mlp_down_bias"])
    return x + attention + down, k_new, v_new


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_no_worse_than_torch(name, dtype):
    """The error against float64 is at most that of PyTorch in the same dtype, or a rounding."""
    kind = KINDS[name]
    tensors, table = torch_layer(kind, dtype)
    wide = {n: None if t is None else t.double() for n, t in tensors.items()}
    expected = run_torch(wide, table, kind)
    theirs = run_torch(tensors, table, kind)
    ours = run(tensors, kind, **where(table))
    for values, peer, exact in zip(ours, theirs, expected, strict=True):
        assert values.shape == peer.shape and values.dtype == dtype
        limit = max(relative_error(peer, exact), relative_error(exact.to(dtype), exact))
        assert relative_error(values, exact) <= 1.1 * limit


@pytest.mark.parametrize("name", [*KINDS, "qwen3"])
def test_opcheck(name):
    kind = FAMILIES["qwen3"][0] if name == "qwen3" else KINDS[name]
    for operator, count in (("decoder_layer", 17), ("attention_mlp_up", 15)):
        tensors, table = torch_layer(kind, torch.float16)
        positions = where(table)["positions"]
        usual = (kind.num_heads, kind.rotary_dim, kind.layer_norm_eps, kind.activation)
        usual += (False, 0, 0) if count == 17 else (0, 0)
        more = (table, kind.num_kv_heads, kind.head_dim, kind.qkv_weight_interleaved)
        more += (kind.norm, kind.gated, kind.parallel_residual)
        arguments = (*list(tensors.values())[:count], 0, positions, *usual, *more)
        if name == "qwen3":  # with all that there is
            weights = head_norms(kind, np.float16).values()
            arguments += tuple(to_torch(weight, torch.float16) for weight in weights)
        torch.library.opcheck(getattr(torch.ops.clusterfusion, operator).default, arguments)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = KINDS["llama"]
    tensors, table = torch_layer(kind, torch.float16)
    options = kind.options | where(table)

    def both(tensors: Tensors, options: Tensors) -> list[torch.Tensor]:
        arguments = list(tensors.values())
        parts = ops.attention_mlp_up(*arguments[:15], **options)
        down = ops.mlp_down(tensors["input"], *parts[:2], *arguments[15:])
        return [*parts, down, *ops.decoder_layer(*arguments, **options)]

    expected = both(tensors, options)
    with FakeTensorMode() as mode:
        fakes = {n: t if t is None else mode.from_tensor(t) for n, t in tensors.items()}
        fake_options = options | {n: mode.from_tensor(t) for n, t in where(table).items()}
        results = both(fakes, fake_options)
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]


@pytest.mark.parametrize("name", ["llama", "interleaved"])
def test_compile(name):
    """Caches are views of one tensor, which the compiled function writes to as well."""
    kind = KINDS[name]

    def step(tensors: Tensors, positions: Any, table: torch.Tensor) -> torch.Tensor:
        return run(tensors, kind, positions=positions, block_table=table)[0] * 2

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for positions in (positions_of(POSITIONS), 0):
        eager, table = torch_layer(kind, torch.float16)
        traced, _ = torch_layer(kind, torch.float16)
        assert torch.equal(compiled(traced, positions, table), step(eager, positions, table))
        for cache in ("k_cache", "v_cache"):
            assert torch.equal(traced[cache], eager[cache])
            assert not torch.equal(traced[cache], torch_layer(kind, torch.float16)[0][cache])


def test_both_positions():
    kind = KINDS["llama"]
    tensors, table = torch_layer(kind, torch.float16)
    arguments = [*tensors.values(), positions_of(POSITIONS)]
    with pytest.raises(TypeError, match=r"^positions: expected None beside current_seq_len"):
        ops.decoder_layer(*arguments, **kind.options | where(table))


def test_parameters_of_head_norms():
    """Weights of a module want gradients, of which there are none."""
    kind = FAMILIES["qwen3"][0]
    tensors, table = torch_layer(kind, torch.float16)
    weights = {n: to_torch(w, torch.float16) for n, w in head_norms(kind, np.float16).items()}
    expected = run(tensors, kind, **where(table), **weights)
    parameters = {n: torch.nn.Parameter(w) for n, w in weights.items()}
    with torch.enable_grad():
        results = run(tensors, kind, **where(table), **parameters)
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
        with pytest.raises(RuntimeError, match=r"clusterfusion\.decoder_layer"):
            results[0].sum().backward()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="NumPy's arrays are in the CPU's memory")
def test_same_as_numpy():
    kind = Kind(64, 4, 2, 96, 16, **LLAMA)
    arrays, table = paged_layer(kind, np.float16, POSITIONS, 32)
    arrays = without_biases(
        arrays
        | random_layer(kind, np.float16, 3)
        | {name: arrays[name] for name in ("k_cache", "v_cache")},
        (),
    )
    tensors = {n: None if a is None else torch.from_numpy(a.copy()) for n, a in arrays.items()}
    numpy_where = {"positions": np.array(POSITIONS, np.int32), "block_table": table}
    expected = ops.decoder_layer(*arrays.values(), **kind.options | numpy_where)
    results = run(tensors, kind, **where(torch.from_numpy(table)))
    assert [r.numpy().tobytes() for r in results] == [e.tobytes() for e in expected]


@pytest.mark.parametrize(
    "name", ["positions", "block_table", "bias_qkv", "ln_bias", "k_norm_weight"]
)
def test_no_elements_are_not_none(name):
    """torch.empty(0) has no address, as what is not there."""
    kind = KINDS["llama"]
    tensors, table = torch_layer(kind, torch.float16)
    options = where(table) | head_norms(kind, np.float16)
    options = {n: torch.as_tensor(value, device=DEVICE) for n, value in options.items()}
    dtype = torch.int32 if name in where(table) else torch.float16
    (options if name in options else tensors)[name] = torch.empty(0, dtype=dtype, device=DEVICE)
    before = tensors["k_cache"].clone()
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        run(tensors, kind, **options)
    assert torch.equal(tensors["k_cache"], before)


def test_tables_of_halves():
    """As vLLM keeps them: cos and then sin, each value once."""
    kind = KINDS["llama"]
    tensors, table = torch_layer(kind, torch.bfloat16)
    positions = positions_of(POSITIONS)
    cos_sin_cache = torch.rand(100, kind.rotary_dim, device=DEVICE).bfloat16()
    c, s = cos_sin_cache[positions].float().chunk(2, -1)
    halves = {"cos": c.repeat(1, 2), "sin": s.repeat(1, 2)}
    k_new = run(tensors | halves, kind, positions=positions, block_table=table)[1]
    normed = norm(tensors["input"], tensors, "ln", kind)
    qkv = F.linear(normed, tensors["weight_qkv"], tensors["bias_qkv"])
    keys = qkv[:, kind.q_size : kind.q_size + kind.kv_size].float().view(k_new.shape)
    low, high = keys.chunk(2, -1)
    c, s = c[:, None], s[:, None]
    expected = torch.cat([low * c - high * s, high * c + low * s], -1)
    assert relative_error(k_new, expected) < 1e-2


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph is captured on a GPU")
@pytest.mark.parametrize("name", KINDS)
def test_cuda_graph(name):
    """One graph serves every position and table, which lie on the device."""
    kind = KINDS[name]
    eager, table = torch_layer(kind, torch.float16)
    replayed = {n: None if t is None else t.clone() for n, t in eager.items()}
    at = where(table.clone())
    for each in (eager, replayed):  # the first call makes what a capture must not
        run(each, kind, **at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(replayed, kind, **at)
    for positions in (POSITIONS, [5, 0, 40], [-1, 20, 64]):
        at["positions"].copy_(positions_of(positions))
        at["block_table"].copy_(table.roll(1, 0))
        graph.replay()
        more = {"positions": positions_of(positions), "block_table": table.roll(1, 0)}
        for found, expected in zip(results, run(eager, kind, **more), strict=True):
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        assert torch.equal(replayed["k_cache"], eager["k_cache"])
