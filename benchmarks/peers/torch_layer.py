"""One GPT-NeoX decoder layer for one new token in plain PyTorch, and random layers for it.

Functional layers and scaled_dot_product_attention on the same tensors that the layer calls take,
which is the least that PyTorch can be made to do; capturable in a CUDA graph for a fixed position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

Tensors = dict[str, torch.Tensor]
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    hidden: int
    intermediate: int
    num_heads: int
    rotary_dim: int

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.hidden // self.num_heads

    @property
    def bytes_of_attention_and_up(self) -> int:
        """Bytes of 16-bit matrices that attention and the MLP's first half read."""
        return 2 * self.hidden * (4 * self.hidden + self.intermediate)

    @property
    def bytes_of_down(self) -> int:
        """Bytes of the 16-bit matrix that the MLP's second half reads."""
        return 2 * self.hidden * self.intermediate

    def bytes_of_cache(self, positions: int) -> int:
        """Bytes of 16-bit keys and values of so many positions."""
        return 2 * 2 * self.hidden * positions


MODELS = {
    "pythia_2b8": Sizes(2560, 10240, 32, 20),
    "pythia_6b9": Sizes(4096, 16384, 32, 32),
}
# Of almost no size, but one that every device computes.
TINY = Sizes(64, 256, 2, 8)


def tested_layers(models: Iterable[str]) -> dict[str, tuple[str, str, bool]]:
    """Give layers to test by name: model, dtype, whether weights are heavy-tailed."""
    return {
        f"{model}-{dtype}-{'heavy' if tail else 'normal'}": (model, dtype, tail)
        for model in models
        for dtype in ("float16", "bfloat16")
        for tail in (False, True)
    }


def random_tensors(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device | str,
    max_seq_len: int,
    seed: int = 0,
    *,
    heavy_tailed: bool = False,
) -> Tensors:
    """Draw the tensors of a decoder layer by name, in the order of its arguments.

    Gains keep attention neither flat nor one-hot and every part of the output near unit size.

    Args:
        sizes: Of the layer.
        dtype: Of all but cos and sin.
        device: Where they lie.
        max_seq_len: Rows of the caches.
        seed: Of the random numbers.
        heavy_tailed: Cubes the normal numbers of matrices and caches (and rescales them).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, around: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if heavy_tailed and len(shape) == 2 and shape[0] > 1:
            values = values**3 / 15**0.5
        return (around + scale * values).to(dtype)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return draw(rows, columns, scale=columns**-0.5)

    hidden, inner = sizes.hidden, sizes.intermediate
    angles = 3.0 * torch.rand(sizes.rotary_dim // 2, generator=generator, device=device)
    angles = torch.cat([angles, angles])
    padding = angles.new_zeros(sizes.head_dim - sizes.rotary_dim)
    return {
        "input": draw(1, hidden),
        "weight_qkv": matrix(3 * hidden, hidden),
        "bias_qkv": draw(3 * hidden, scale=0.2),
        "weight_o": matrix(hidden, hidden),
        "bias_o": draw(hidden, scale=0.2),
        "k_cache": draw(max_seq_len, hidden),
        "v_cache": draw(max_seq_len, hidden),
        "ln_weight": draw(hidden, scale=0.2, around=1.0),
        "ln_bias": draw(hidden, scale=0.1),
        "cos": torch.cat([angles.cos(), padding + 1]),
        "sin": torch.cat([angles.sin(), padding]),
        "post_ln_weight": draw(hidden, scale=0.2, around=1.0),
        "post_ln_bias": draw(hidden, scale=0.1),
        "mlp_up_weight": matrix(inner, hidden),
        "mlp_up_bias": draw(inner, scale=0.2),
        "mlp_down_weight": matrix(hidden, inner),
        "mlp_down_bias": draw(hidden, scale=0.2),
    }


def widened(tensors: Tensors) -> Tensors:
    """Give the same numbers in float64, for a reference."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int) -> torch.Tensor:
    """Take x cos + rotate_half(x) sin over the first `dim` values of [num_heads, head_dim]."""
    turned = heads[:, :dim].to(cos.dtype)
    other = torch.cat([-turned[:, dim // 2 :], turned[:, : dim // 2]], dim=-1)
    result = turned * cos[:dim] + other * sin[:dim]
    return torch.cat([result.to(heads.dtype), heads[:, dim:]], dim=-1)


def attention(t: Tensors, sizes: Sizes, position: int) -> tuple[torch.Tensor, ...]:
    """Compute attn_output [1, hidden], k_new, v_new [1, num_heads, head_dim]; write the caches."""
    hidden, heads, dim = sizes.hidden, sizes.num_heads, sizes.head_dim
    norm = F.layer_norm(t["input"].view(1, hidden), (hidden,), t["ln_weight"], t["ln_bias"], EPS)
    qkv = F.linear(norm, t["weight_qkv"], t["bias_qkv"]).view(heads, 3, dim)
    query = rotate(qkv[:, 0], t["cos"], t["sin"], sizes.rotary_dim)
    k_new = rotate(qkv[:, 1], t["cos"], t["sin"], sizes.rotary_dim)
    v_new = qkv[:, 2]
    t["k_cache"][position] = k_new.reshape(-1)
    t["v_cache"][position] = v_new.reshape(-1)
    keys, values = (
        t[name][: position + 1].view(1, position + 1, heads, dim).transpose(1, 2)
        for name in ("k_cache", "v_cache")
    )
    attended = F.scaled_dot_product_attention(query.view(1, heads, 1, dim), keys, values)
    attn_output = F.linear(attended.reshape(1, hidden), t["weight_o"], t["bias_o"])
    return attn_output, k_new[None], v_new[None]


def mlp_up(t: Tensors, sizes: Sizes) -> torch.Tensor:
    """Compute mlp_intermediate [intermediate], after GELU."""
    hidden = sizes.hidden
    x = t["input"].view(1, hidden)
    norm = F.layer_norm(x, (hidden,), t["post_ln_weight"], t["post_ln_bias"], EPS)
    return F.gelu(F.linear(norm, t["mlp_up_weight"], t["mlp_up_bias"])).view(-1)


def attention_mlp_up(t: Tensors, sizes: Sizes, position: int) -> tuple[torch.Tensor, ...]:
    """Compute attn_output, mlp_intermediate, k_new, v_new."""
    attn_output, k_new, v_new = attention(t, sizes, position)
    return attn_output, mlp_up(t, sizes), k_new, v_new


def mlp_down(t: Tensors, attn_output: torch.Tensor, mlp_intermediate: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output from its halves."""
    down = F.linear(mlp_intermediate.view(1, -1), t["mlp_down_weight"], t["mlp_down_bias"])
    return t["input"] + attn_output + down


def decoder_layer(t: Tensors, sizes: Sizes, position: int) -> tuple[torch.Tensor, ...]:
    """Compute output, k_new, v_new."""
    attn_output, mlp_intermediate, k_new, v_new = attention_mlp_up(t, sizes, position)
    return mlp_down(t, attn_output, mlp_intermediate), k_new, v_new


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute the L2 norm of the difference over the L2 norm of the reference."""
    reference = reference.double().flatten()
    return float((values.double().flatten() - reference).norm() / reference.norm())
