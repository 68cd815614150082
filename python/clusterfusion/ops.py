"""One decoder layer, or a part of it, for one new token on your own tensors.

The layer is the one with the parallel residual, as in every Pythia model::

    output = input + attention(layer_norm(input)) + mlp(post_layer_norm(input))

Options make it one of Llama's, Mistral's or Qwen's, and take a batch over paged caches.
docs/layer-calls.md shows how.

Tensors are torch's (2.4 or newer) or NumPy's (bfloat16 as `ml_dtypes.bfloat16`), all on one device;
results are of the same kind. All but `cos`, `sin` and the position have one dtype, float16 or
bfloat16. Each is contiguous, but for paged caches, and starts at a multiple of 16 bytes. What is
written (caches, results) overlaps nothing else. Sums, norms and softmax are float32.

They run where the tensors are: on the CPU, or on a GPU that the package has code for (compute
capability 8.0 or later), on torch's current stream; docs/layer-calls.md says which shapes are one
kernel there, and what holds for streams and CUDA graphs. They may be called from several threads.
The same functions are operators of torch (`torch.ops.clusterfusion`), which `torch.compile` goes
through. They compute no gradients.

Errors come before anything runs and name the argument, what was expected and what was found:
`TypeError` (dtypes, things that are no tensors), `ValueError` (shapes, layout, devices, overlap, a
full cache), `NotImplementedError` (devices that this build does not run on).
"""

from __future__ import annotations

from collections.abc import Sequence

from clusterfusion._layer_calls import (
    ATTENTION_MLP_UP,
    DECODER_LAYER,
    GENERAL_ATTENTION_MLP_UP,
    GENERAL_DECODER_LAYER,
    HAS_TORCH,
    MLP_DOWN,
    Tensor,
    make_call,
)
from clusterfusion._layer_docs import documented

if HAS_TORCH:
    from clusterfusion import _torch_calls  # noqa: F401

__all__ = ["attention_mlp_up", "decoder_layer", "mlp_down"]

# What help() calls the sizes that the tensors have.
_SYMBOLS = {
    "hidden": "hidden",
    "qkv": "q_size + 2 kv_size",
    "qkv_rows": "rows as `qkv_weight_interleaved` says. q_size is num_heads * head_dim, kv_size is "
    "num_kv_heads * head_dim: both are hidden unless options say otherwise.",
    "q_size": "q_size",
    "kv_size": "kv_size",
    "or_gated": ", gated [2 intermediate, hidden] with the gate's rows first",
    "or_gated_bias": ", gated [2 intermediate], or None",
    "or_rms": ", with an RMSNorm None",
    "rows": "rows",
    "or_pages": ", or pages (see `block_table`)",
    "or_rows": ", or [rows, intermediate]",
    "intermediate": "intermediate",
    "head_dim": "head_dim",
    "rotary_dim": "rotary_dim",
    "or_none": ", or None",
    "attention": ":func:`attention_mlp_up`",
}


@documented(_SYMBOLS, out="The four results to write to, instead of new ones.")
def attention_mlp_up(
    input: Tensor,
    weight_qkv: Tensor,
    bias_qkv: Tensor | None,
    weight_o: Tensor,
    bias_o: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    post_ln_weight: Tensor,
    post_ln_bias: Tensor | None,
    mlp_up_weight: Tensor,
    mlp_up_bias: Tensor | None,
    current_seq_len: int | Tensor | None = None,
    *,
    positions: int | Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_weight_interleaved: bool = True,
    rotary_dim: int | None = None,
    norm: str = "layer",
    layer_norm_eps: float = 1e-5,
    activation: str = "gelu",
    gated: bool = False,
    parallel_residual: bool = True,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes attention and the first half of the MLP for one new token, or one of each row.

    Writes the new token's key and value to row `current_seq_len` of the caches.

    Returns:
        attn_output [rows, hidden] (with bias, without residual), mlp_intermediate [intermediate],
        with a block table [rows, intermediate] (after the activation), k_new and v_new [rows,
        num_kv_heads, head_dim] (what the caches got).
    """
    tensors = (
        input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias,
        cos, sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias,
    )  # fmt: skip
    settings = (current_seq_len, num_heads, rotary_dim, layer_norm_eps, activation, 0, 0)
    plain = positions is block_table is num_kv_heads is head_dim is None
    plain = plain and qkv_weight_interleaved is parallel_residual is True and gated is False
    if plain and norm == "layer" and q_norm_weight is k_norm_weight is None:
        return make_call(ATTENTION_MLP_UP, tensors, settings, out)
    more = (
        positions, block_table, num_kv_heads, head_dim, qkv_weight_interleaved, norm, gated,
        parallel_residual, q_norm_weight, k_norm_weight,
    )  # fmt: skip
    return make_call(GENERAL_ATTENTION_MLP_UP, tensors, (*settings, *more), out)


@documented(_SYMBOLS, out="The result to write to, instead of a new one.")
def mlp_down(
    hidden_states: Tensor,
    attn_output: Tensor,
    mlp_intermediate: Tensor,
    mlp_down_weight: Tensor,
    mlp_down_bias: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes the second half of the MLP and adds up the layer's output.

    Returns:
        hidden_states + attn_output + the MLP's output, in the shape of `hidden_states`.
    """
    results = make_call(
        MLP_DOWN,
        (
            hidden_states,
            attn_output,
            mlp_intermediate,
            mlp_down_weight,
            mlp_down_bias,
        ),
        (0, 0),
        None if out is None else (out,),
    )
    return results[0]


@documented(_SYMBOLS, out="The three results to write to, instead of new ones.")
def decoder_layer(
    input: Tensor,
    weight_qkv: Tensor,
    bias_qkv: Tensor | None,
    weight_o: Tensor,
    bias_o: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    post_ln_weight: Tensor,
    post_ln_bias: Tensor | None,
    mlp_up_weight: Tensor,
    mlp_up_bias: Tensor | None,
    mlp_down_weight: Tensor,
    mlp_down_bias: Tensor | None,
    current_seq_len: int | Tensor | None = None,
    *,
    positions: int | Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_weight_interleaved: bool = True,
    rotary_dim: int | None = None,
    norm: str = "layer",
    layer_norm_eps: float = 1e-5,
    activation: str = "gelu",
    gated: bool = False,
    parallel_residual: bool = True,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    split: bool = False,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a whole decoder layer for one new token, or one of each row.

    Returns:
        output (the layer's, in the shape of `input`), k_new and v_new [rows, num_kv_heads,
        head_dim] (what the caches got).
    """
    tensors = (
        input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias,
        cos, sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias,
        mlp_down_weight, mlp_down_bias,
    )  # fmt: skip
    settings = (current_seq_len, num_heads, rotary_dim, layer_norm_eps, activation, split, 0, 0)
    plain = positions is block_table is num_kv_heads is head_dim is None
    plain = plain and qkv_weight_interleaved is parallel_residual is True and gated is False
    if plain and norm == "layer" and q_norm_weight is k_norm_weight is None:
        return make_call(DECODER_LAYER, tensors, settings, out)
    more = (
        positions, block_table, num_kv_heads, head_dim, qkv_weight_interleaved, norm, gated,
        parallel_residual, q_norm_weight, k_norm_weight,
    )  # fmt: skip
    return make_call(GENERAL_DECODER_LAYER, tensors, (*settings, *more), out)
