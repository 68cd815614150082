"""The layer calls on torch tensors, and the same as operators of torch.

Operators `torch.ops.clusterfusion.{attention_mlp_up, mlp_down, decoder_layer}`: what torch.compile,
fake tensors and autograd see. They have no gradient: asking for one raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from clusterfusion._layer_calls import (
    CACHES,
    FRAMEWORKS,
    GENERAL_ATTENTION_MLP_UP,
    GENERAL_DECODER_LAYER,
    MLP_DOWN,
    OPTIONAL,
    OTHER_POSITION,
    POSITION,
    SUBCLASSES,
    LayerCall,
    check,
    check_out,
    explain,
)

_SETTING_TYPES = {
    "num_heads": "SymInt",
    "rotary_dim": "SymInt?",
    "layer_norm_eps": "float",
    "activation": "str",
    "split": "bool",
    "hidden_size": "SymInt",
    "intermediate_size": "SymInt",
    "block_table": "Tensor?",
    "num_kv_heads": "SymInt?",
    "head_dim": "SymInt?",
    "qkv_weight_interleaved": "bool",
    "norm": "str",
    "gated": "bool",
    "parallel_residual": "bool",
    "q_norm_weight": "Tensor?",
    "k_norm_weight": "Tensor?",
}


def _run(
    call: LayerCall,
    tensors: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    if torch.compiler.is_dynamo_compiling():
        return _dispatch(call, tensors, settings, out)
    values = (*tensors, *settings) if call.defaults else tensors
    if torch.is_grad_enabled() and _wants_gradient(values):
        check(call, tensors, settings)  # whose errors say more than the dispatcher's
        return _dispatch(call, tensors, settings, out)
    return _run_native(call, tensors, settings, out)


def _wants_gradient(tensors: tuple[Any, ...]) -> bool:
    return True in [getattr(tensor, "requires_grad", False) for tensor in tensors]


def _run_native(
    call: LayerCall,
    tensors: Sequence[Any],
    settings: Sequence[Any],
    out: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    results = None
    try:
        if out is None:
            results = call.allocate(tensors[0].new_empty, tensors, settings)
        else:
            results = check_out(call, out)
        call.native(*tensors, *settings, *results)
    except Exception:
        explain(call, tensors, settings, results)
        raise
    return results


def _dispatch(
    call: LayerCall,
    tensors: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    if out is not None:
        out = check_out(call, out)
        _check_out_tensors(call, tensors, settings, out)
    if call.settings[0] == POSITION:
        position, *rest = settings
        if OTHER_POSITION in call.settings:
            # No pop(): to torch.compile `rest` is a tuple.
            at = call.settings.index(OTHER_POSITION) - 1
            position = _one_position(position, rest[at])
            rest = [*rest[:at], *rest[at + 1 :]]
        if isinstance(position, torch.Tensor):
            settings = (0, position, *rest)
        else:
            settings = (position, None, *rest)
    results = getattr(torch.ops.clusterfusion, call.name)(*tensors, *settings)
    if isinstance(results, torch.Tensor):
        results = (results,)
    if out is None:
        return tuple(results)
    for destination, result in zip(out, results, strict=True):
        destination.copy_(result.view(destination.shape))
    return out


def _one_position(position: Any, other: Any) -> Any:
    """What was given under one of two names: operators of torch have one."""
    if other is None:
        return position
    if position is not None:
        raise TypeError(
            f"{OTHER_POSITION}: expected None beside {POSITION}, which says the same, found "
            f"{type(other).__name__}"
        )
    return other


def _check_out_tensors(
    call: LayerCall, tensors: Sequence[Any], settings: Sequence[Any], out: Sequence[torch.Tensor]
) -> None:
    """Raises what the library would raise for results of another form than those it writes."""
    like = tensors[0]
    shapes = call.allocate(lambda *shape: shape, tensors, settings)
    for name, tensor, shape in zip(call.results, out, shapes, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype}, found {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected device {like.device}, found {tensor.device}")
        if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")


def _schema(call: LayerCall) -> str:
    """The operator's arguments: tensors, then settings, the position as a number and a tensor."""
    parameters = []
    for name in call.tensors:
        kind = "Tensor?" if name in OPTIONAL else "Tensor"
        if name in CACHES:
            kind = f"Tensor({name}!)"
        parameters.append(f"{kind} {name}")
    first_default = len(call.settings) - len(call.defaults)
    for index, name in enumerate(call.settings):
        if name == POSITION:
            parameters += [f"SymInt {POSITION}", "Tensor? position"]
        if name in (POSITION, OTHER_POSITION):
            continue
        default = ""
        if index >= first_default:
            default = "=" + str(call.defaults[index - first_default])
            if _SETTING_TYPES[name] == "str":
                default = f'="{call.defaults[index - first_default]}"'
        parameters.append(f"{_SETTING_TYPES[name]} {name}{default}")
    results = ", ".join("Tensor" for _ in call.results)
    return f"({', '.join(parameters)}) -> {results if len(call.results) == 1 else f'({results})'}"


def _split_arguments(
    call: LayerCall, arguments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and settings of a call from those of the operator, whose last may be left out."""
    count = len(call.tensors)
    tensors, settings = arguments[:count], arguments[count:]
    if call.settings[0] == POSITION:
        number, position, *rest = settings
        settings = (number if position is None else position, *rest)
        if OTHER_POSITION in call.settings:
            index = call.settings.index(OTHER_POSITION)
            settings = (*settings[:index], None, *settings[index:])
    given = len(settings) - len(call.settings) + len(call.defaults)
    return tensors, (*settings, *call.defaults[given:])


def _register(call: LayerCall) -> None:
    def unwrap(results: tuple[torch.Tensor, ...]) -> Any:
        return results[0] if len(results) == 1 else results

    def compute(*arguments: Any) -> Any:
        tensors, settings = _split_arguments(call, arguments)
        return unwrap(_run_native(call, tensors, settings, None))

    def fake(*arguments: Any) -> Any:
        tensors, settings = _split_arguments(call, arguments)
        return unwrap(call.allocate(tensors[0].new_empty, tensors, settings))

    operator = torch.library.custom_op(
        f"clusterfusion::{call.name}",
        compute,
        mutates_args=[name for name in call.tensors if name in CACHES],
        schema=_schema(call),
    )
    operator.register_fake(fake)


for _call in (GENERAL_ATTENTION_MLP_UP, MLP_DOWN, GENERAL_DECODER_LAYER):
    _register(_call)

FRAMEWORKS[torch.Tensor] = FRAMEWORKS[torch.nn.Parameter] = _run
SUBCLASSES[torch.Tensor] = _dispatch
