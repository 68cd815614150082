"""Turning what a caller passes into what the C++ library takes, or into a clear error."""

import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class DLPackArray(Protocol):
    """Any array that can be exchanged by DLPack: NumPy, torch, JAX, CuPy, ..."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


Text: TypeAlias = str | bytes | bytearray | memoryview
Tokens: TypeAlias = Sequence[int] | DLPackArray
Prompt: TypeAlias = Text | Tokens


def is_text(value: object) -> TypeGuard[Text]:
    """Whether a value is text rather than token ids."""
    return isinstance(value, str | bytes | bytearray | memoryview)


def is_batch(value: object) -> TypeGuard[Sequence[Prompt]]:
    """Whether a value is a list or tuple of prompts, or of nothing, rather than one prompt."""
    if not isinstance(value, list | tuple):
        return False
    return not value or any(
        is_text(item) or isinstance(item, Sequence) or _is_array(item) for item in value
    )


def _is_array(value: object) -> bool:
    # NumPy's scalars speak DLPack too; they are numbers here.
    return hasattr(value, "__dlpack__") and not isinstance(value, np.generic)


def utf8(name: str, text: object) -> bytes:
    """Returns a text's UTF-8 bytes; bytes, in whatever holds them, are passed on as they are.

    Raises:
        TypeError: The value is neither str nor bytes (bytearray, memoryview of bytes).
        ValueError: The str holds a lone surrogate, which no UTF-8 stands for.
    """
    if isinstance(text, bytes):
        return text
    if isinstance(text, memoryview) and text.itemsize != 1:
        raise TypeError(
            f"{name}: expected text or bytes, found a memoryview of elements of {text.itemsize} "
            "bytes; for token ids pass a list or an array"
        )
    if isinstance(text, bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected str or bytes, found {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text, found the lone surrogate U+{ord(text[error.start]):04X} at "
            f"index {error.start}; pass bytes, or text.encode('utf-8', 'replace')"
        ) from None


def file_path(name: str, path: object) -> str:
    """Returns a path as str.

    Raises:
        TypeError: The value is not a path.
        ValueError: It holds a null character, or a byte that is not UTF-8.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name}: expected str or os.PathLike, found {type(path).__name__}")
    result = os.fspath(path)
    if not isinstance(result, str):
        raise TypeError(f"{name}: expected a path of str, found one of {type(result).__name__}")
    if "\0" in result:
        raise ValueError(f"{name}: expected a path, found a null character in {result!r}")
    return _checked_utf8(name, "a path in UTF-8", result)


def text_option(name: str, value: object) -> str:
    """Returns a short text such as a device's name.

    Raises:
        TypeError: The value is not a str.
        ValueError: It holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, found {type(value).__name__}")
    return _checked_utf8(name, "text", value)


def _checked_utf8(name: str, expected: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}: expected {expected}, found a lone surrogate in {text!r}"
        ) from None
    return text


def integer(name: str, value: object, low: int = INT64_MIN, high: int = INT64_MAX) -> int:
    """Returns an integer in [low, high].

    Raises:
        TypeError: The value is not an integer.
        ValueError: It is outside the range that the library can hold.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, found bool")
    try:
        result = operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise TypeError(f"{name}: expected an integer, found {type(value).__name__}") from None
    if low <= result <= high:
        return result
    if high == INT64_MAX and low > INT64_MIN:
        raise ValueError(f"{name}: expected an integer of at least {low}, found {result}")
    raise ValueError(f"{name}: expected an integer in [{low}, {high}], found {result}")


def number(name: str, value: object) -> float:
    """Returns a real number.

    Raises:
        TypeError: The value is not one.
    """
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    try:
        return float(cast(SupportsFloat, value))
    except TypeError:
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: {value} is too large for a float") from None


def boolean(name: str, value: object) -> bool:
    """Returns a truth value.

    Raises:
        TypeError: The value is not one.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected bool, found {type(value).__name__}")
    return bool(value)


def callback(name: str, value: object) -> Callable[..., object]:
    """Returns something that can be called.

    Raises:
        TypeError: The value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, found {type(value).__name__}")
    return value


def prompt_tokens(name: str, prompt: object) -> npt.NDArray[np.int32]:
    """Returns the token ids of a prompt that is not text; errors are those of token_ids()."""
    if not isinstance(prompt, Sequence) and not _is_array(prompt):
        raise TypeError(
            f"{name}: expected str, bytes, a sequence of integers or a DLPack array, found "
            f"{type(prompt).__name__}"
        )
    return token_ids(name, prompt)


def token_ids(name: str, tokens: object) -> npt.NDArray[np.int32]:
    """Returns token ids as a new contiguous int32 vector.

    Args:
        name: The argument's name, for messages.
        tokens: A sequence of integers, or any DLPack array of integers on the CPU, 1-D.

    Raises:
        TypeError: The value is not a vector of integers in host memory.
        ValueError: It has another number of dimensions than one.
        IndexError: A token id does not fit into 32 bits.
    """
    values = _from_dlpack(name, tokens) if _is_array(tokens) else _from_sequence(name, tokens)
    if values.ndim != 1:
        rows = f"; pass {name}[0], or list({name}) as a batch" if values.ndim == 2 else ""
        raise ValueError(
            f"{name}: expected a vector of token ids, found shape {values.shape}{rows}"
        )
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, found dtype {values.dtype}")
    outside = np.flatnonzero((values < INT32_MIN) | (values > INT32_MAX))
    if outside.size:
        index = int(outside[0])
        raise IndexError(
            f"{name}: expected token ids below 2**31, found {values[index]} at index {index}"
        )
    return np.array(values, dtype=np.int32, order="C")


# The library's names of what a caller of this package calls otherwise.
_NAMES = {
    "prompt_tokens": "prompt",
    "stop_strings": "stop",
    "num_logprobs": "logprobs",
    "max_positions": "context",
}
# Likewise what an error says of its place, by the library's name of the list.
_PLACES = {
    "requests": (
        (r"^requests\[(\d+)\]: prompt_tokens\[", r"prompt[\1]["),
        (r"^requests\[", "prompt["),
    ),
    "texts": ((r"^texts\[(\d+)\]: tokens\[", r"prompt[\1]["), (r"^texts\[", "prompt[")),
    "pairs": (
        (r"^requests\[(\d+)\]: (context|continuation)\[", r"\2s[\1]["),
        (r"^requests\[", "contexts["),
    ),
}
_NAME_PATTERN = re.compile(rf"(?<![\w\"'/.])({'|'.join(_NAMES)})(?![\w/])")


@contextmanager
def in_callers_words(places: str = "requests") -> Iterator[None]:
    """Lets errors of the library name arguments as this package does.

    Args:
        places: What is passed in a list: "requests", "texts" or "pairs".
    """
    try:
        yield
    except Exception as error:
        message = renamed = str(error)
        for pattern, replacement in _PLACES[places]:
            renamed = re.sub(pattern, replacement, renamed)
        renamed = _NAME_PATTERN.sub(lambda match: _NAMES[match[1]], renamed)
        if renamed == message:
            raise
        renamed_error = type(error)(renamed)
        vars(renamed_error).update(vars(error))
        raise renamed_error from None


def not_picklable(value: object, remedy: str) -> TypeError:
    """Returns the error for objects that live in this process alone."""
    name = type(value).__name__
    return TypeError(
        f"{name} cannot be pickled or copied: it holds memory of this process; make one in each "
        f"process: {remedy}"
    )


def _from_dlpack(name: str, array: Any) -> npt.NDArray[Any]:
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected an integer array in host memory, found {type(array).__name__}, "
            f"which NumPy cannot take by DLPack ({error}); copy it to the CPU first"
        ) from error


def _from_sequence(name: str, tokens: object) -> npt.NDArray[Any]:
    if is_text(tokens) or not isinstance(tokens, Sequence):
        raise TypeError(
            f"{name}: expected a sequence of integers or a DLPack array, found "
            f"{type(tokens).__name__}"
        )
    for index, token in enumerate(tokens):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(
                f"{name}: expected integers, found {type(token).__name__} at index {index}"
            )
    try:
        return np.array(tokens, dtype=np.int64)
    except OverflowError:
        index = next(i for i, t in enumerate(tokens) if not INT32_MIN <= t <= INT32_MAX)
        raise IndexError(
            f"{name}: expected token ids below 2**31, found {tokens[index]} at index {index}"
        ) from None
