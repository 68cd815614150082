"""Steering and ablation: what a caller passes as the C++ library takes it, and ways back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clusterfusion._arguments import integer, number


class Steering(NamedTuple):
    """Arguments of engine_steer()."""

    layers: list[int]
    values: list[npt.NDArray[np.float32]]
    scale: float


class Ablation(NamedTuple):
    """Arguments of engine_ablate()."""

    layers: list[int]
    heads: list[list[int]]
    mlps: list[int]


NO_STEERING = Steering([], [], 1.0)
NO_ABLATION = Ablation([], [], [])


def steering(vectors: object, scale: object, hidden_size: int) -> Steering:
    """Returns steering as the library takes it.

    Args:
        vectors: A mapping from layers to arrays [hidden_size] or [positions, hidden_size] of
            numbers in host memory, or None for nothing.
        scale: What the arrays are multiplied by.
        hidden_size: The model's.

    Raises:
        TypeError: An argument has the wrong type, or an array lies on another device.
        ValueError: An array has another shape.
    """
    factor = number("scale", scale)
    if vectors is None:
        return NO_STEERING
    if not isinstance(vectors, Mapping):
        raise TypeError(
            f"vectors: expected a dict of layer to array, or None, found {type(vectors).__name__}"
        )
    layers = [integer("vectors", layer) for layer in vectors]
    arrays = [
        _steering_array(f"vectors[{layer}]", array, hidden_size) for layer, array in vectors.items()
    ]
    return Steering(layers, arrays, factor)


def ablation(heads: object, mlps: object) -> Ablation:
    """Returns an ablation as the library takes it.

    Args:
        heads: A mapping from layers to numbers of heads, or None for none.
        mlps: Layers.

    Raises:
        TypeError: An argument has the wrong type.
    """
    if heads is None:
        heads = {}
    if not isinstance(heads, Mapping):
        raise TypeError(
            f"heads: expected a dict of layer to numbers of heads, found {type(heads).__name__}"
        )
    return Ablation(
        [integer("heads", layer) for layer in heads],
        [integers(f"heads[{layer}]", numbers) for layer, numbers in heads.items()],
        integers("mlps", mlps),
    )


def integers(name: str, values: object) -> list[int]:
    """Returns several integers as a list.

    Raises:
        TypeError: The value is no list, range, array or other series of integers.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of integers, found {type(values).__name__}")
    return [integer(f"{name}[{index}]", value) for index, value in enumerate(values)]


def names(name: str, values: object) -> list[str]:
    """Returns one text, or several, as a list.

    Raises:
        TypeError: The value is neither.
    """
    listed = [values] if isinstance(values, str) else values
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{name}: expected a name or a list of names, found {values!r}")
    return list(listed)


class Undo:
    """In a ``with`` block: puts back at its end what held before."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()


def _steering_array(name: str, array: Any, hidden_size: int) -> npt.NDArray[np.float32]:
    values = _host_array(name, array)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, found dtype {values.dtype}")
    if values.ndim not in (1, 2) or values.shape[-1] != hidden_size or not values.size:
        raise ValueError(
            f"{name}: expected shape [{hidden_size}] (the model's hidden_size), or [positions, "
            f"{hidden_size}], found {list(values.shape)}"
        )
    return np.ascontiguousarray(values, dtype=np.float32)


def _host_array(name: str, array: Any) -> npt.NDArray[Any]:
    # torch's own way, as NumPy knows no bfloat16 and torch exports no tensor that has a gradient.
    if hasattr(array, "detach") and hasattr(array, "cpu"):
        array = array.detach().cpu().float()
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        return np.asarray(array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected an array of numbers in host memory, found {type(array).__name__}, "
            f"which NumPy cannot take by DLPack ({error}); copy it to the CPU first"
        ) from error
