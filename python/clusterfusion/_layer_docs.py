"""What help() says of the layer calls' arguments: said once, for every call that takes them.

A text is a format: what stands in braces is a symbol in :mod:`clusterfusion.ops` and a number in
the calls by the names of models.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

_ARGUMENTS = {
    "input": "[{rows}, {hidden}] or [1, {rows}, {hidden}]; the residual stream.",
    "weight_qkv": "[{qkv}, {hidden}]; {qkv_rows}",
    "bias_qkv": "[{qkv}]{or_none}.",
    "weight_o": "[{hidden}, {q_size}].",
    "bias_o": "[{hidden}]{or_none}.",
    "k_cache": "[max_seq_len, {kv_size}]{or_pages}; keys after the rotary embedding.",
    "v_cache": "[max_seq_len, {kv_size}]{or_pages}.",
    "ln_weight": "[{hidden}]; of the norm before attention.",
    "ln_bias": "[{hidden}]{or_rms}.",
    "cos": "float32 [{rotary_dim}], or [{head_dim}] or [1, {head_dim}] with 1 past {rotary_dim}; "
    "of the new position.",
    "sin": "float32, as `cos`, with 0 past {rotary_dim}.",
    "post_ln_weight": "[{hidden}]; of the norm before the MLP.",
    "post_ln_bias": "[{hidden}]{or_rms}.",
    "mlp_up_weight": "[{intermediate}, {hidden}]{or_gated}.",
    "mlp_up_bias": "[{intermediate}]{or_gated_bias}.",
    "mlp_down_weight": "[{hidden}, {intermediate}].",
    "mlp_down_bias": "[{hidden}]{or_none}.",
    "hidden_states": "[{rows}, {hidden}] or [1, {rows}, {hidden}]; the layer's input.",
    "attn_output": "[{rows}, {hidden}]; of {attention}.",
    "mlp_intermediate": "[{intermediate}]{or_rows}; of {attention}.",
    "current_seq_len": "Positions that the caches hold, 0 to max_seq_len - 1, which is also the "
    "new token's position: an int, or an int32 tensor of one element on the same device. One on a "
    "GPU is read when the kernel runs and cannot be checked: outside that range all results are "
    "NaN, and the caches stay as they are.",
    "positions": "The same by another name, for a batch: an int for all rows, or an int32 tensor "
    "[rows] on the same device.",
    "block_table": "int32 [rows, max_pages]: the pages of each row's sequence, from position 0 on. "
    "With it there may be 1 to 16 rows, in `input`, `cos` and `sin` and all results, and caches "
    "are [pages, page_size, num_kv_heads, head_dim], with pages of 16, 32 or 64 positions and the "
    "same strides, any in which no two elements share memory and the last dimension has no gaps. "
    "A row whose position in a tensor, or one of whose pages up to it, is outside has NaN in all "
    "results and writes nothing; entries behind are not looked at. All rows write before any "
    "reads, so rows may be tokens of one sequence that follow each other; no two may write to one "
    "place.",
    "num_heads": "Divides hidden, unless `head_dim` is given.",
    "head_dim": "Values of a head. None: hidden / num_heads.",
    "num_kv_heads": "Heads of keys and values, a divisor of `num_heads`: each belongs to as many "
    "query heads that follow each other. None: as many as `num_heads`.",
    "qkv_weight_interleaved": "Whether rows of `weight_qkv` and `bias_qkv` are, for each head of "
    "keys and values, its queries, its key and its value; or else all queries, then all keys, then "
    "all values, as `torch.cat` of three projections gives them. (The name is that of NVIDIA's "
    "Transformer Engine.)",
    "rotary_dim": "How many values of a head are rotated. None: as many as `cos` has, if these are "
    "fewer than head_dim.",
    "norm": '"layer" for LayerNorm, or "rms" for RMSNorm, x / sqrt(mean of x^2 + eps) * weight.',
    "layer_norm_eps": "Of both norms, of either kind, and of those of queries and keys.",
    "gated": "Whether the MLP is down(activation(gate x) * up x), or else down(activation(up x)).",
    "parallel_residual": "Whether the MLP's norm takes the layer's input; or else input + "
    "attention, as in Llama.",
    "q_norm_weight": "[head_dim] of an RMSNorm of each head's query before the rotation, as in "
    "Qwen3, or None.",
    "k_norm_weight": "The same of keys; there if `q_norm_weight` is.",
    "activation": 'By the names of `hidden_act` in config.json: "gelu" is the exact one, '
    '"gelu_pytorch_tanh" and "gelu_new" its tanh form; also "quick_gelu", "relu", "relu2", '
    '"silu", "mish", "tanh", "sigmoid", "linear".',
    "split": "One kernel for each half of the layer instead of one for both, where the shape is "
    "one that can be streamed; elsewhere both are the same.",
}


def documented(words: Mapping[str, object], **own: str) -> Callable[[_FunctionT], _FunctionT]:
    """A decorator that completes a call's docstring, and returns the function itself.

    The section of the arguments goes before those of results and errors, and `words` take the
    places of the names in braces.

    Args:
        words: For each name in braces.
        **own: Texts of arguments that mean something else, or are there for this call only.

    Raises:
        KeyError: An argument has no text, or a name in braces no word.
    """

    def complete(function: _FunctionT) -> _FunctionT:
        texts = {**_ARGUMENTS, **own}
        parameters = inspect.signature(function).parameters
        arguments = "\n".join(_entry(name, texts[name].format_map(words)) for name in parameters)
        text = (inspect.getdoc(function) or "").format_map(words)
        about, *rest = re.split(r"^(?=(?:Returns|Raises):$)", text, maxsplit=1, flags=re.MULTILINE)
        sections = (about.rstrip(), f"Args:\n{arguments}", *rest)
        function.__doc__ = "\n\n".join(sections)
        return function

    return complete


def _entry(name: str, text: str) -> str:
    """One argument in the section of all, as wide as a docstring in a module."""
    return textwrap.fill(
        f"{name}: {text}",
        width=96,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )
