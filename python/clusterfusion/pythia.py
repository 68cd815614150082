"""The layer calls by the names of Pythia models, with their sizes built in.

For Pythia-2.8B and 6.9B each: `attention_only`, `mlp_only`, `decoder_layer`, `decoder_layer_split`
and the three calls of a graph context. They are thin over :mod:`clusterfusion.ops`, which says what
holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from clusterfusion._arguments import integer
from clusterfusion._layer_calls import (
    ATTENTION_MLP_UP,
    DECODER_LAYER,
    GRAPH_CONTEXT,
    MLP_DOWN,
    Tensor,
    check,
    make_call,
)
from clusterfusion._layer_docs import documented


class LayerSizes(NamedTuple):
    """What the layers of a model have in common.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Rows of the MLP's first matrix.
        num_heads: Attention heads; each has hidden_size / num_heads values.
        rotary_dim: Values of a head that are rotated.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    rotary_dim: int


class LayerCalls(NamedTuple):
    """The calls for one model."""

    attention_only: Callable[..., Any]
    mlp_only: Callable[..., Any]
    decoder_layer: Callable[..., Any]
    decoder_layer_split: Callable[..., Any]
    create_graph_context: Callable[..., Any]
    graph_decode_step: Callable[..., Any]
    destroy_graph_context: Callable[..., Any]


# LayerNorm's epsilon and the activation of every Pythia model.
_EPS, _GELU = 1e-5, "gelu"


def layer_calls(prefix: str, sizes: LayerSizes) -> LayerCalls:
    """Makes the calls for layers of one size.

    Args:
        prefix: What the functions' names begin with.
        sizes: Of the layers; tensors of other sizes raise.
    """
    contexts: _Contexts = {}
    calls = LayerCalls(
        _attention_only(sizes),
        _mlp_only(sizes),
        _decoder_layer(sizes, split=False),
        _decoder_layer(sizes, split=True),
        _create_graph_context(prefix, sizes, contexts),
        _graph_decode_step(prefix, sizes, contexts),
        _destroy_graph_context(prefix, contexts),
    )
    _name_and_document(prefix, sizes, calls)
    return calls


def _name_and_document(prefix: str, sizes: LayerSizes, calls: LayerCalls) -> None:
    """The calls are made once for each model: their names and texts say which."""
    words = {
        "prefix": prefix,
        "hidden": sizes.hidden_size,
        "qkv": 3 * sizes.hidden_size,
        "qkv_rows": "rows are query, key and value of head 0, then of head 1, ..., as GPT-NeoX "
        "checkpoints have them.",
        "q_size": sizes.hidden_size,
        "kv_size": sizes.hidden_size,
        "or_gated": "",
        "or_gated_bias": "",
        "or_rms": "",
        "rows": 1,
        "or_pages": "",
        "or_rows": "",
        "intermediate": sizes.intermediate_size,
        "num_heads": sizes.num_heads,
        "head_dim": sizes.hidden_size // sizes.num_heads,
        "rotary_dim": sizes.rotary_dim,
        "or_none": "",
        "attention": f"`{prefix}_attention_only`",
    }
    for name, function in calls._asdict().items():
        words["how"] = ", one launch for each half of it" if name.endswith("split") else ""
        function.__name__ = function.__qualname__ = f"{prefix}_{name}"
        documented(words, **_OWN_ARGUMENTS.get(name, {}))(function)


# What arguments are that mean something else in one of the calls than in the others.
_OWN_ARGUMENTS = {
    "create_graph_context": {
        "ctx_id": "A number of your choice that no living context has.",
        "max_seq_len": "Rows of the caches.",
    },
    "graph_decode_step": {
        "ctx_id": "Of `{prefix}_create_graph_context`.",
        "k_cache": "The context's.",
        "v_cache": "The context's.",
    },
    "destroy_graph_context": {"ctx_id": "Of `{prefix}_create_graph_context`."},
}

# ---- the calls: each function makes one of them for one size of layers ----


def _attention_only(sizes: LayerSizes) -> Callable[..., Any]:
    hidden, intermediate, num_heads, rotary_dim = sizes

    def attention_only(
        input: Tensor,
        weight_qkv: Tensor,
        bias_qkv: Tensor,
        weight_o: Tensor,
        bias_o: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        ln_weight: Tensor,
        ln_bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        post_ln_weight: Tensor,
        post_ln_bias: Tensor,
        mlp_up_weight: Tensor,
        mlp_up_bias: Tensor,
        current_seq_len: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes attention and the first half of the MLP for one new token.

        Writes row current_seq_len of the caches. dtype: float16 or bfloat16, cos and sin float32.

        Returns:
            attn_output [1, {hidden}] (with bias, without residual), mlp_intermediate
            [{intermediate}] (after GELU), k_new (after RoPE) and v_new
            [1, {num_heads}, {head_dim}].
        """
        return make_call(
            ATTENTION_MLP_UP,
            (
                input,
                weight_qkv,
                bias_qkv,
                weight_o,
                bias_o,
                k_cache,
                v_cache,
                ln_weight,
                ln_bias,
                cos,
                sin,
                post_ln_weight,
                post_ln_bias,
                mlp_up_weight,
                mlp_up_bias,
            ),
            (current_seq_len, num_heads, rotary_dim, _EPS, _GELU, hidden, intermediate),
            None,
        )

    return attention_only


def _mlp_only(sizes: LayerSizes) -> Callable[..., Any]:
    hidden, intermediate, _, _ = sizes

    def mlp_only(
        hidden_states: Tensor,
        attn_output: Tensor,
        mlp_intermediate: Tensor,
        mlp_down_weight: Tensor,
        mlp_down_bias: Tensor,
    ) -> Tensor:
        """Computes the second half of the MLP and adds up the layer's output.

        Returns:
            hidden_states + attn_output + the MLP's output, in the shape of hidden_states.
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
            (hidden, intermediate),
            None,
        )
        return results[0]

    return mlp_only


def _decoder_layer(sizes: LayerSizes, split: bool) -> Callable[..., Any]:
    hidden, intermediate, num_heads, rotary_dim = sizes

    def decoder_layer(
        input: Tensor,
        weight_qkv: Tensor,
        bias_qkv: Tensor,
        weight_o: Tensor,
        bias_o: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        ln_weight: Tensor,
        ln_bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        post_ln_weight: Tensor,
        post_ln_bias: Tensor,
        mlp_up_weight: Tensor,
        mlp_up_bias: Tensor,
        mlp_down_weight: Tensor,
        mlp_down_bias: Tensor,
        current_seq_len: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes a whole decoder layer for one new token{how}.

        Returns:
            output (the layer's, in the shape of input), k_new (after RoPE) and v_new
            [1, {num_heads}, {head_dim}].
        """
        return make_call(
            DECODER_LAYER,
            (
                input,
                weight_qkv,
                bias_qkv,
                weight_o,
                bias_o,
                k_cache,
                v_cache,
                ln_weight,
                ln_bias,
                cos,
                sin,
                post_ln_weight,
                post_ln_bias,
                mlp_up_weight,
                mlp_up_bias,
                mlp_down_weight,
                mlp_down_bias,
            ),
            (current_seq_len, num_heads, rotary_dim, _EPS, _GELU, split, hidden, intermediate),
            None,
        )

    return decoder_layer


# ---- graph contexts: large tensors that are checked once and kept ----


class _GraphContext(NamedTuple):
    k_cache: Tensor
    v_cache: Tensor
    weight_qkv: Tensor
    weight_o: Tensor
    mlp_up_weight: Tensor
    mlp_down_weight: Tensor


# The living contexts of one model, by their numbers. torch.compile sees through a plain dict.
_Contexts: TypeAlias = dict[int, _GraphContext]


def _unknown_context(prefix: str, contexts: _Contexts, ctx_id: object) -> KeyError:
    living = ", ".join(map(str, sorted(contexts))) or "there is none"
    return KeyError(
        f"ctx_id: expected a context of {prefix}_create_graph_context ({living}), found {ctx_id!r}"
    )


def _create_graph_context(
    prefix: str, sizes: LayerSizes, contexts: _Contexts
) -> Callable[..., Any]:
    def create_graph_context(
        ctx_id: int,
        k_cache: Tensor,
        v_cache: Tensor,
        weight_qkv: Tensor,
        weight_o: Tensor,
        mlp_up_weight: Tensor,
        mlp_down_weight: Tensor,
        max_seq_len: int,
    ) -> None:
        """Checks and keeps a layer's large tensors, for `{prefix}_graph_decode_step`.

        The tensors are referred to, not copied. Contexts of this model are shared by all threads.

        Raises:
            ValueError: There is a context of this number, or a tensor does not fit.
            TypeError: A tensor's dtype does not fit, or something is no tensor.
        """
        ctx_id = integer("ctx_id", ctx_id)
        context = _GraphContext(
            k_cache, v_cache, weight_qkv, weight_o, mlp_up_weight, mlp_down_weight
        )
        check(GRAPH_CONTEXT, context, (sizes.hidden_size, sizes.intermediate_size))
        if integer("max_seq_len", max_seq_len) != k_cache.shape[0]:
            raise ValueError(
                f"max_seq_len: expected {k_cache.shape[0]}, the rows of k_cache, found "
                f"{max_seq_len}"
            )
        if contexts.setdefault(ctx_id, context) is not context:
            raise ValueError(
                f"ctx_id: expected a number that has no context, found {ctx_id}, which has one; "
                f"destroy it first ({prefix}_destroy_graph_context)"
            )

    return create_graph_context


def _graph_decode_step(prefix: str, sizes: LayerSizes, contexts: _Contexts) -> Callable[..., Any]:
    hidden, intermediate, num_heads, rotary_dim = sizes

    def graph_decode_step(
        ctx_id: int,
        input: Tensor,
        ln_weight: Tensor,
        ln_bias: Tensor,
        bias_qkv: Tensor,
        bias_o: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        post_ln_weight: Tensor,
        post_ln_bias: Tensor,
        mlp_up_bias: Tensor,
        mlp_down_bias: Tensor,
        current_seq_len: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes a whole decoder layer with the large tensors of a context.

        Returns:
            output (the layer's, in the shape of input), k_new (after RoPE) and v_new
            [1, {num_heads}, {head_dim}].

        Raises:
            KeyError: There is no context of this number.
        """
        context = contexts.get(ctx_id)
        if context is None:
            raise _unknown_context(prefix, contexts, ctx_id)
        if k_cache is not context.k_cache or v_cache is not context.v_cache:
            _require_caches(ctx_id, context, k_cache, v_cache)
        return make_call(
            DECODER_LAYER,
            (
                input,
                context.weight_qkv,
                bias_qkv,
                context.weight_o,
                bias_o,
                k_cache,
                v_cache,
                ln_weight,
                ln_bias,
                cos,
                sin,
                post_ln_weight,
                post_ln_bias,
                context.mlp_up_weight,
                mlp_up_bias,
                context.mlp_down_weight,
                mlp_down_bias,
            ),
            (current_seq_len, num_heads, rotary_dim, _EPS, _GELU, False, hidden, intermediate),
            None,
        )

    return graph_decode_step


def _destroy_graph_context(prefix: str, contexts: _Contexts) -> Callable[..., Any]:
    def destroy_graph_context(ctx_id: int) -> None:
        """Forgets a context of `{prefix}_create_graph_context`.

        Raises:
            KeyError: There is no context of this number.
        """
        if contexts.pop(ctx_id, None) is None:
            raise _unknown_context(prefix, contexts, ctx_id)

    return destroy_graph_context


def _require_caches(ctx_id: int, context: _GraphContext, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises unless the caches are the context's; views of the same memory will do."""
    for name, tensor, expected in (
        ("k_cache", k_cache, context.k_cache),
        ("v_cache", v_cache, context.v_cache),
    ):
        if _place(tensor) != _place(expected):
            raise ValueError(
                f"{name}: expected the tensor that context {ctx_id} was created with, found another"
            )


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]] | None:
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data, tensor.shape
    return (tensor.data_ptr(), tuple(tensor.shape)) if hasattr(tensor, "data_ptr") else None


# ---- the models ----

_2B8 = layer_calls("pythia_2b8", LayerSizes(2560, 10240, 32, 20))
pythia_2b8_attention_only = _2B8.attention_only
pythia_2b8_mlp_only = _2B8.mlp_only
pythia_2b8_decoder_layer = _2B8.decoder_layer
pythia_2b8_decoder_layer_split = _2B8.decoder_layer_split
pythia_2b8_create_graph_context = _2B8.create_graph_context
pythia_2b8_graph_decode_step = _2B8.graph_decode_step
pythia_2b8_destroy_graph_context = _2B8.destroy_graph_context

_6B9 = layer_calls("pythia_6b9", LayerSizes(4096, 16384, 32, 32))
pythia_6b9_attention_only = _6B9.attention_only
pythia_6b9_mlp_only = _6B9.mlp_only
pythia_6b9_decoder_layer = _6B9.decoder_layer
pythia_6b9_decoder_layer_split = _6B9.decoder_layer_split
pythia_6b9_create_graph_context = _6B9.create_graph_context
pythia_6b9_graph_decode_step = _6B9.graph_decode_step
pythia_6b9_destroy_graph_context = _6B9.destroy_graph_context
