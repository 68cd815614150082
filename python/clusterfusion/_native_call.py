"""Calls of the C++ library, and what becomes of them when the interpreter ends.

Before Python 3.14 the interpreter ends a daemon thread where that thread asks for the GIL, by
unwinding its stack. C++ frames do not survive that: the process would abort. So no thread may be
inside a call then. At exit, calls in flight are interrupted and waited for, and a daemon thread
that makes another call ends there, as silently as the interpreter would end it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import tvm_ffi

_PATIENCE_SECONDS = 10.0

# One object for each call that runs, added and removed in one bytecode each.
_running: set[object] = set()
_is_exiting = False

# Threads that other processes have forked away from are not in a call here.
os.register_at_fork(after_in_child=_running.clear)


@tvm_ffi.register_error
class MalformedFileError(Exception):
    """The contents of a file are wrong, as the library says it; callers get a ValueError."""


def is_of_file(error: ValueError) -> bool:
    """Whether a call raised it because of a file's contents, not of an argument."""
    return isinstance(error.__context__, MalformedFileError)


class NativeFunction:
    """A function of the library that releases the GIL while it runs.

    What it returns consists of Python's own lists, dicts, texts and bytes, and tensors: reading
    containers of apache-tvm-ffi would be calls of it.
    """

    __slots__ = ("function",)

    def __init__(self, function: tvm_ffi.Function) -> None:
        """Takes an exported function."""
        function.release_gil = True
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Calls it; its errors are Python's exceptions."""
        call = object()
        _running.add(call)
        try:
            if _is_exiting:
                _end_daemon_thread()
            result = self.function(*arguments)
            return None if result is None else _plain(result)
        except MalformedFileError as error:
            raise ValueError(*error.args) from None  # its context tells is_of_file()
        finally:
            _running.discard(call)
            if _is_exiting:
                _end_daemon_thread()


def interrupt_at_exit(set_ending: Callable[[bool], object]) -> None:
    """Makes the interpreter's end wait for calls of other threads.

    Args:
        set_ending: Tells the library whether all calls are to end soon.
    """

    def end_calls() -> None:
        global _is_exiting
        _is_exiting = True
        set_ending(True)
        patience_ends = time.monotonic() + _PATIENCE_SECONDS
        while _running:
            if time.monotonic() > patience_ends:
                return
            time.sleep(0.001)
        set_ending(False)  # other exit handlers may make calls

    atexit.register(end_calls)


def _end_daemon_thread() -> None:
    """At exit only daemon threads are left besides the main one, which may go on."""
    if threading.current_thread() is not threading.main_thread():
        raise SystemExit  # which `threading` takes for a thread's normal end


def _plain(value: Any) -> Any:
    if isinstance(value, tvm_ffi.Array):
        return [_plain(item) for item in value]
    if isinstance(value, tvm_ffi.Map):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):  # tvm-ffi's own class is one, but prints longer
        return str(value)
    return bytes(value) if isinstance(value, bytes) else value
