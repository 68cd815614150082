"""One GPT-NeoX decoder layer for one new token in float64, in plain NumPy, and random layers.

Formulas: transformers/models/gpt_neox. It shares no code with the library. The new key and value
are rounded to the tensors' dtype before attention sees them, because the cache holds them so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from reference_model import ACTIVATIONS

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None  # the tests that need it are skipped

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    hidden: int
    num_heads: int
    intermediate: int
    rotary_dim: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads


@dataclass
class Layer:
    """What a layer computes for one token, in float64."""

    attn_output: np.ndarray
    mlp_intermediate: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    output: np.ndarray


def shapes_of(sizes: Sizes, max_seq_len: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder layer by name, in the order of its arguments."""
    hidden, inner = sizes.hidden, sizes.intermediate
    return {
        "input": (1, hidden),
        "weight_qkv": (3 * hidden, hidden),
        "bias_qkv": (3 * hidden,),
        "weight_o": (hidden, hidden),
        "bias_o": (hidden,),
        "k_cache": (max_seq_len, hidden),
        "v_cache": (max_seq_len, hidden),
        "ln_weight": (hidden,),
        "ln_bias": (hidden,),
        "cos": (sizes.rotary_dim,),
        "sin": (sizes.rotary_dim,),
        "post_ln_weight": (hidden,),
        "post_ln_bias": (hidden,),
        "mlp_up_weight": (inner, hidden),
        "mlp_up_bias": (inner,),
        "mlp_down_weight": (hidden, inner),
        "mlp_down_bias": (hidden,),
    }


def random_arrays(
    sizes: Sizes,
    dtype: Any,
    max_seq_len: int,
    seed: int = 0,
    *,
    heavy_tailed: bool = False,
    mean: float = 0.0,
) -> Arrays:
    """Random tensors of a decoder layer.

    Gains keep attention neither flat nor one-hot and every part of the output near unit size.

    heavy_tailed: weights and caches from Student's t with 3 degrees of freedom.
    mean: of the input, whose deviation is 1.
    """
    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("cos", "sin"):
            return random.uniform(-1, 1, shape).astype(np.float32)
        values = random.standard_t(3, shape) if heavy_tailed else random.standard_normal(shape)
        if name.endswith("_cache"):
            scale, around = 1.0, 0.0
        elif name == "input":
            scale, around = 1.0, mean
        elif len(shape) == 2:
            scale, around = 1.0 / math.sqrt(shape[1]), 0.0
        else:
            scale, around = 0.2, 1.0 if name.endswith("ln_weight") else 0.0
        return (around + scale * values).astype(np.float32).astype(dtype)

    return {name: draw(name, shape) for name, shape in shapes_of(sizes, max_seq_len).items()}


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Float64 values as `dtype` holds them. (NumPy rounds float64 to bfloat16 by float32.)"""
    return values.astype(dtype).astype(np.float64)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * weight + bias


def rotate(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotary_dim: int) -> np.ndarray:
    """x cos + rotate_half(x) sin over the first rotary_dim values of [num_heads, head_dim]."""
    turned, rest = heads[:, :rotary_dim], heads[:, rotary_dim:]
    half = rotary_dim // 2
    other = np.concatenate([-turned[:, half:], turned[:, :half]], axis=1)
    return np.concatenate([turned * cos[:rotary_dim] + other * sin[:rotary_dim], rest], axis=1)


def reference_layer(
    arrays: Arrays,
    position: int,
    sizes: Sizes,
    *,
    eps: float = 1e-5,
    activation: str = "gelu",
) -> Layer:
    """Attention and MLP of one token at `position`. Leaves the caches alone."""
    dtype = arrays["input"].dtype
    a = {k: None if v is None else v.astype(np.float64) for k, v in arrays.items()}
    shape = (sizes.num_heads, sizes.head_dim)
    x = a["input"].reshape(-1)

    def linear(name: str, bias: str, values: np.ndarray) -> np.ndarray:
        return a[name] @ values + (0.0 if a[bias] is None else a[bias])

    norm = layer_norm(x, a["ln_weight"], a["ln_bias"], eps)
    qkv = linear("weight_qkv", "bias_qkv", norm).reshape(sizes.num_heads, 3, sizes.head_dim)
    query, key = (rotate(qkv[:, i], a["cos"], a["sin"], sizes.rotary_dim) for i in (0, 1))
    value = qkv[:, 2]
    keys = np.concatenate([a["k_cache"][:position].reshape(-1, *shape), rounded(key, dtype)[None]])
    values = np.concatenate(
        [a["v_cache"][:position].reshape(-1, *shape), rounded(value, dtype)[None]]
    )
    scores = np.einsum("hd,phd->hp", query, keys) / math.sqrt(sizes.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hp,phd->hd", weights, values).reshape(-1)
    attn_output = linear("weight_o", "bias_o", attended)

    post_norm = layer_norm(x, a["post_ln_weight"], a["post_ln_bias"], eps)
    up = linear("mlp_up_weight", "mlp_up_bias", post_norm)
    mlp_intermediate = ACTIVATIONS[activation](up)
    output = x + attn_output + linear("mlp_down_weight", "mlp_down_bias", mlp_intermediate)
    return Layer(attn_output, mlp_intermediate, key, value, output)
