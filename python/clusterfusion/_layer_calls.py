"""How a layer call gets from Python's tensors to the C++ library and back.

The results come from the caller's framework, each with memory of its own; then one call of the
library, through apache-tvm-ffi, takes all tensors by DLPack and runs on torch's current stream.
Nothing is looked at in Python unless something went wrong. torch's dispatcher is gone through only
where it is needed: under torch.compile, with fake tensors, and where a gradient is asked for (there
is none).
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tvm_ffi

from clusterfusion import _native

Tensor: TypeAlias = Any  # torch.Tensor or numpy.ndarray
Allocate: TypeAlias = Callable[..., Tensor]  # of a shape's sizes


class LayerCall(NamedTuple):
    """One function of the C++ library. Its arguments: tensors, settings, results.

    Without results it only checks.
    """

    name: str
    native: Any
    tensors: tuple[str, ...]
    settings: tuple[str, ...]
    results: tuple[str, ...]
    # New results from an allocator, the tensors and the settings.
    allocate: Callable[[Allocate, Sequence[Tensor], Sequence[Any]], tuple[Tensor, ...]]
    # Of the last settings, which an operator of torch may be called without.
    defaults: tuple[Any, ...] = ()


POSITION = "current_seq_len"
OTHER_POSITION = "positions"  # of a general call, whose first setting is then None
OPTIONAL = ("bias_qkv", "bias_o", "ln_bias", "post_ln_bias", "mlp_up_bias", "mlp_down_bias")
CACHES = ("k_cache", "v_cache")

_LAYER_TENSORS = (
    "input",
    "weight_qkv",
    "bias_qkv",
    "weight_o",
    "bias_o",
    "k_cache",
    "v_cache",
    "ln_weight",
    "ln_bias",
    "cos",
    "sin",
    "post_ln_weight",
    "post_ln_bias",
    "mlp_up_weight",
    "mlp_up_bias",
)
_LAYER_SETTINGS = (POSITION, "num_heads", "rotary_dim", "layer_norm_eps", "activation")
_SIZES = ("hidden_size", "intermediate_size")
# What only the general calls take, with what it is to the others.
_MORE_SETTINGS: dict[str, Any] = {
    "positions": None,
    "block_table": None,
    "num_kv_heads": None,
    "head_dim": None,
    "qkv_weight_interleaved": True,
    "norm": "layer",
    "gated": False,
    "parallel_residual": True,
    "q_norm_weight": None,
    "k_norm_weight": None,
}


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if num_heads < 1 or hidden_size % num_heads != 0:
        raise ValueError(
            f"num_heads: expected a divisor of the hidden size {hidden_size}, found {num_heads}"
        )
    return hidden_size // num_heads


def _attention_mlp_up_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    hidden, num_heads = tensors[0].shape[-1], settings[1]
    head_dim = _head_dim(hidden, num_heads)
    return (
        allocate(1, hidden),
        allocate(tensors[13].shape[0]),
        allocate(1, num_heads, head_dim),
        allocate(1, num_heads, head_dim),
    )


def _mlp_down_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    return (allocate(*tensors[0].shape),)


def _decoder_layer_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    shape, num_heads = tensors[0].shape, settings[1]
    head_dim = _head_dim(shape[-1], num_heads)
    return (
        allocate(*shape),
        allocate(1, num_heads, head_dim),
        allocate(1, num_heads, head_dim),
    )


def _more_settings(settings: Sequence[Any]) -> dict[str, Any]:
    """Those of a general call, which come last."""
    return dict(zip(_MORE_SETTINGS, settings[-len(_MORE_SETTINGS) :], strict=True))


def _key_value_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    more, num_heads = _more_settings(settings), settings[1]
    rows = 1 if more["block_table"] is None else tensors[0].shape[-2]
    num_kv_heads = num_heads if more["num_kv_heads"] is None else more["num_kv_heads"]
    head_dim = more["head_dim"]
    if head_dim is None:
        head_dim = _head_dim(tensors[0].shape[-1], num_heads)
    return allocate(rows, num_kv_heads, head_dim), allocate(rows, num_kv_heads, head_dim)


def _general_attention_mlp_up_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    more = _more_settings(settings)
    hidden, intermediate = tensors[0].shape[-1], tensors[13].shape[0]
    if more["gated"]:
        intermediate //= 2
    is_paged = more["block_table"] is not None
    rows = tensors[0].shape[-2] if is_paged else 1
    return (
        allocate(rows, hidden),
        allocate(rows, intermediate) if is_paged else allocate(intermediate),
        *_key_value_results(allocate, tensors, settings),
    )


def _general_decoder_layer_results(
    allocate: Allocate, tensors: Sequence[Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    return (
        allocate(*tensors[0].shape),
        *_key_value_results(allocate, tensors, settings),
    )


ATTENTION_MLP_UP = LayerCall(
    "attention_mlp_up",
    _native.ops_attention_mlp_up,
    _LAYER_TENSORS,
    (*_LAYER_SETTINGS, *_SIZES),
    ("attn_output", "mlp_intermediate", "k_new", "v_new"),
    _attention_mlp_up_results,
)
MLP_DOWN = LayerCall(
    "mlp_down",
    _native.ops_mlp_down,
    ("hidden_states", "attn_output", "mlp_intermediate", "mlp_down_weight", "mlp_down_bias"),
    _SIZES,
    ("output",),
    _mlp_down_results,
)
DECODER_LAYER = LayerCall(
    "decoder_layer",
    _native.ops_decoder_layer,
    (*_LAYER_TENSORS, "mlp_down_weight", "mlp_down_bias"),
    (*_LAYER_SETTINGS, "split", *_SIZES),
    ("output", "k_new", "v_new"),
    _decoder_layer_results,
)
# The same with all options. They are apart because each argument takes time, in every call.
GENERAL_ATTENTION_MLP_UP = ATTENTION_MLP_UP._replace(
    native=_native.ops_general_attention_mlp_up,
    settings=(*ATTENTION_MLP_UP.settings, *_MORE_SETTINGS),
    allocate=_general_attention_mlp_up_results,
    defaults=tuple(_MORE_SETTINGS.values()),
)
GENERAL_DECODER_LAYER = DECODER_LAYER._replace(
    native=_native.ops_general_decoder_layer,
    settings=(*DECODER_LAYER.settings, *_MORE_SETTINGS),
    allocate=_general_decoder_layer_results,
    defaults=tuple(_MORE_SETTINGS.values()),
)
GRAPH_CONTEXT = LayerCall(
    "check_graph_context",
    _native.ops_check_graph_context,
    ("k_cache", "v_cache", "weight_qkv", "weight_o", "mlp_up_weight", "mlp_down_weight"),
    _SIZES,
    (),
    lambda allocate, tensors, settings: (),
)


Run: TypeAlias = Callable[
    [LayerCall, tuple[Tensor, ...], tuple[Any, ...], Sequence[Tensor] | None], Any
]
# How a call is made, by the type of its first tensor; _run_subclass() where that is not here.
FRAMEWORKS: dict[type, Run] = {}
SUBCLASSES: dict[type, Run] = {}

# apache-tvm-ffi imports torch wherever there is one. Before 2.4 torch.library has no custom_op.
_torch: Any = sys.modules.get("torch")
HAS_TORCH = hasattr(getattr(_torch, "library", None), "custom_op")


def make_call(
    call: LayerCall,
    tensors: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    out: Sequence[Tensor] | None,
) -> Any:
    """Makes a call in the way of its first tensor's framework.

    Raises:
        TypeError: The first tensor is neither torch's nor NumPy's.
    """
    return FRAMEWORKS.get(type(tensors[0]), _run_subclass)(call, tensors, settings, out)


def _run_subclass(
    call: LayerCall,
    tensors: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    out: Sequence[Tensor] | None,
) -> Any:
    """Makes a call whose first tensor is of a subclass of a known type."""
    for base, run in SUBCLASSES.items():
        if isinstance(tensors[0], base):
            return run(call, tensors, settings, out)
    raise TypeError(
        f"{call.tensors[0]}: expected a torch.Tensor (of torch 2.4 or newer) or a numpy.ndarray, "
        f"found {type(tensors[0]).__name__}"
    )


def check_out(call: LayerCall, out: object) -> tuple[Tensor, ...]:
    """Returns what the caller wants results in, as a tuple of the right length."""
    names = ", ".join(call.results)
    if not isinstance(out, tuple | list):
        raise TypeError(f"out: expected a tuple ({names}), found {type(out).__name__}")
    if len(out) != len(call.results):
        raise ValueError(f"out: expected {len(call.results)} tensors ({names}), found {len(out)}")
    return tuple(out)


def explain(
    call: LayerCall,
    tensors: Sequence[Tensor],
    settings: Sequence[Any],
    results: Sequence[Tensor] | None,
) -> None:
    """After an error: raises one that names the argument, if there is a better one than that.

    Args:
        call: The call that failed.
        tensors: Its tensors.
        settings: Its settings.
        results: Where its results were to go; None if there are none yet.
    """
    named = [*zip(call.tensors, tensors, strict=True), *zip(call.settings, settings, strict=True)]
    if results is not None:
        named += zip(call.results, results, strict=True)
    for name, value in named:
        if not hasattr(value, "__dlpack__") or isinstance(value, tvm_ffi.Tensor):
            continue
        try:
            tvm_ffi.from_dlpack(value)
        except Exception as error:
            raise _not_taken(name, value, error) from error
    if results is None:
        call.native(*tensors, *settings)


def _not_taken(name: str, value: object, error: Exception) -> TypeError:
    reason = str(error).partition("\n")[0]
    return TypeError(
        f"{name}: expected a dense tensor in CPU or CUDA memory, found a {type(value).__name__} "
        f"that cannot be taken by DLPack ({reason})"
    )


def check(call: LayerCall, tensors: Sequence[Tensor], settings: Sequence[Any]) -> None:
    """Checks the arguments of a call without making it."""
    exported = [_export(*named) for named in zip(call.tensors, tensors, strict=True)]
    try:
        call.native(*exported, *settings)
    except Exception:
        explain(call, exported, settings, None)
        raise


def _run_numpy(
    call: LayerCall,
    tensors: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    out: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    if call.defaults:
        settings = tuple(_export(*named) for named in zip(call.settings, settings, strict=True))
    elif call.settings[0] == POSITION:
        settings = (_export(POSITION, settings[0]), *settings[1:])
    exported = [_export(*named) for named in zip(call.tensors, tensors, strict=True)]
    exported_results = None
    try:
        if out is None:
            results = call.allocate(
                lambda *shape: np.empty(shape, tensors[0].dtype), tensors, settings
            )
        else:
            results = check_out(call, out)
        exported_results = [_export(*named) for named in zip(call.results, results, strict=True)]
        call.native(*exported, *settings, *exported_results)
    except Exception:
        explain(call, exported, settings, exported_results)
        raise
    return results


def _export(name: str, value: object) -> object:
    """An array or number of NumPy as tvm-ffi takes it; anything else as it is."""
    if isinstance(value, np.integer):
        return operator.index(value)
    if not isinstance(value, np.ndarray):
        return value
    if not value.flags.writeable:
        return _export_read_only(name, value)
    if value.dtype.name == "bfloat16":  # of the package ml_dtypes
        return _native.ops_as_bfloat16(tvm_ffi.from_dlpack(value.view(np.uint16)))
    return value


def _export_read_only(name: str, array: np.ndarray[Any, Any]) -> object:
    if name in _WRITTEN:
        raise ValueError(f"{name}: expected a writable array, found a read-only one")
    is_bfloat16 = array.dtype.name == "bfloat16"
    bits = array.view(np.uint16) if is_bfloat16 else array
    try:
        exported = tvm_ffi.from_dlpack(bits.__dlpack__(max_version=(1, 0)))
    except BufferError as error:  # a type or an order of bytes that DLPack does not know
        raise _not_taken(name, array, error) from error
    except TypeError:
        raise TypeError(
            f"{name}: expected a writable array, found a read-only one, which NumPy exports from "
            f"version 2.1 on (this is {np.__version__}); pass a copy"
        ) from None
    return _native.ops_as_bfloat16(exported) if is_bfloat16 else exported


_WRITTEN = {*CACHES, *ATTENTION_MLP_UP.results, *MLP_DOWN.results, *DECODER_LAYER.results}

FRAMEWORKS[np.ndarray] = _run_numpy
SUBCLASSES[np.ndarray] = _run_numpy
