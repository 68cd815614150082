"""One decoder layer of any kind for a few rows in float64, in plain NumPy, and random layers.

What layer_reference.py is for GPT-NeoX's layer and one row. Formulas: transformers/models/gpt_neox
and llama. It shares no code with the library. New keys and values are rounded to the tensors' dtype
before attention sees them, because the cache holds them so; all rows store theirs before any reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from layer_reference import Arrays, rotate, rounded
from reference_model import ACTIVATIONS


@dataclass(frozen=True)
class Kind:
    """What a layer is, by the names of the calls' options."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    rotary_dim: int
    qkv_weight_interleaved: bool = True
    layer_norm_eps: float = 1e-5
    activation: str = "gelu"
    head_dim: int | None = None
    norm: str = "layer"
    gated: bool = False
    parallel_residual: bool = True

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden // self.num_heads

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.size_of_head

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.size_of_head

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("hidden", "intermediate")
        }


def shapes_of(kind: Kind, rows: int) -> dict[str, tuple[int, ...]]:
    """The tensors of decoder_layer by name, in the order of its arguments, without caches."""
    hidden, inner = kind.hidden, kind.intermediate
    up = 2 * inner if kind.gated else inner
    return {
        "input": (rows, hidden),
        "weight_qkv": (kind.q_size + 2 * kind.kv_size, hidden),
        "bias_qkv": (kind.q_size + 2 * kind.kv_size,),
        "weight_o": (hidden, kind.q_size),
        "bias_o": (hidden,),
        "k_cache": (),
        "v_cache": (),
        "ln_weight": (hidden,),
        "ln_bias": (hidden,),
        "cos": (rows, kind.rotary_dim),
        "sin": (rows, kind.rotary_dim),
        "post_ln_weight": (hidden,),
        "post_ln_bias": (hidden,),
        "mlp_up_weight": (up, hidden),
        "mlp_up_bias": (up,),
        "mlp_down_weight": (hidden, inner),
        "mlp_down_bias": (hidden,),
    }


def random_layer(kind: Kind, dtype: Any, rows: int = 1, seed: int = 0) -> Arrays:
    """Random tensors; gains keep attention neither flat nor one-hot. The caches are missing."""
    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("cos", "sin"):
            return random.uniform(-1, 1, shape).astype(np.float32)
        if name == "input":
            scale, around = 1.0, 0.0
        elif len(shape) == 2:
            scale, around = 1.0 / math.sqrt(shape[1]), 0.0
        else:
            scale, around = 0.2, 1.0 if name.endswith("ln_weight") else 0.0
        values = around + scale * random.standard_normal(shape)
        return values.astype(np.float32).astype(dtype)

    shapes = shapes_of(kind, rows)
    if kind.norm == "rms":
        shapes |= {"ln_bias": (), "post_ln_bias": ()}
    return {name: draw(name, shape) if shape else None for name, shape in shapes.items()}


def random_cache(shape: tuple[int, ...], dtype: Any, seed: int = 1) -> np.ndarray:
    """Keys or values, of whatever shape."""
    random = np.random.default_rng(seed)
    return random.standard_normal(shape).astype(np.float32).astype(dtype)


class ReferenceRows:
    """A layer's results for rows, each a float64 array with a row first."""

    def __init__(
        self,
        arrays: Arrays,
        kind: Kind,
        positions: list[int],
        table: np.ndarray | None = None,
        head_norms: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        """Of caches [pages, page_size, num_kv_heads, head_dim] by `table`, or of rows without."""
        self.kind = kind
        self.head_norms = head_norms
        self.dtype = arrays["input"].dtype
        self.wide = {k: None if v is None else v.astype(np.float64) for k, v in arrays.items()}
        heads = (kind.num_kv_heads, kind.size_of_head)
        if table is None:
            table = np.zeros((len(positions), 1), np.int32)
            caches = [self.wide[name].reshape(1, -1, *heads) for name in ("k_cache", "v_cache")]
        else:
            caches = [self.wide[name] for name in ("k_cache", "v_cache")]
        normed = self.norm(self.wide["input"], "ln")
        queries, self.k_new, self.v_new = self.project(normed)
        page_size = caches[0].shape[1]
        for row, position in enumerate(positions):
            page, slot = table[row, position // page_size], position % page_size
            for cache, new in zip(caches, (self.k_new, self.v_new), strict=True):
                cache[page, slot] = rounded(new[row], self.dtype)
        heads_out = []
        for row, position in enumerate(positions):
            pages = table[row, : position // page_size + 1]
            keys, values = (c[pages].reshape(-1, *heads)[: position + 1] for c in caches)
            heads_out.append(self.attend(queries[row], keys, values))
        self.caches = caches  # with the new keys and values, in float64
        self.attn_output = self.linear(np.stack(heads_out), "weight_o", "bias_o")
        self.finish()

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self.wide[f"{name}_weight"]
        if self.kind.norm == "rms":
            return self.rms_norm(x, weight)
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.kind.layer_norm_eps)
        return centred / scale * weight + self.wide[f"{name}_bias"]

    def rms_norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.kind.layer_norm_eps)
        return x / scale * weight.astype(np.float64)

    def linear(self, x: np.ndarray, weight: str, bias: str) -> np.ndarray:
        y = x @ self.wide[weight].T
        return y if self.wide[bias] is None else y + self.wide[bias]

    def project(self, normed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values, [rows, heads, head_dim], the first two rotated."""
        kind, dim = self.kind, self.kind.size_of_head
        qkv = self.linear(normed, "weight_qkv", "bias_qkv")
        if kind.qkv_weight_interleaved:
            parts = qkv.reshape(-1, kind.num_kv_heads, kind.group + 2, dim)
            parts = np.split(parts, [kind.group, kind.group + 1], axis=2)
        else:
            parts = np.split(qkv, [kind.q_size, kind.q_size + kind.kv_size], axis=1)
        q, k, v = (part.reshape(len(qkv), -1, dim) for part in parts)
        if self.head_norms is not None:
            q, k = (self.rms_norm(x, w) for x, w in zip((q, k), self.head_norms, strict=True))
        return self.turn(q), self.turn(k), v

    def turn(self, heads: np.ndarray) -> np.ndarray:
        tables = zip(heads, self.wide["cos"], self.wide["sin"], strict=True)
        return np.stack([rotate(x, cos, sin, self.kind.rotary_dim) for x, cos, sin in tables])

    def attend(self, query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        keys, values = (np.repeat(each, self.kind.group, axis=1) for each in (keys, values))
        scores = np.einsum("hd,phd->hp", query, keys) / math.sqrt(self.kind.size_of_head)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hp,phd->hd", weights, values).reshape(-1)

    def finish(self) -> None:
        """The MLP and the sum of all."""
        x = self.wide["input"]
        between = x if self.kind.parallel_residual else x + self.attn_output
        up = self.linear(self.norm(between, "post_ln"), "mlp_up_weight", "mlp_up_bias")
        activation = ACTIVATIONS[self.kind.activation]
        if self.kind.gated:
            gate, up = np.split(up, 2, axis=1)
            self.mlp_intermediate = activation(gate) * up
        else:
            self.mlp_intermediate = activation(up)
        down = self.linear(self.mlp_intermediate, "mlp_down_weight", "mlp_down_bias")
        self.output = x + self.attn_output + down
