"""An OpenAI-compatible server over an engine: ``clusterfusion serve MODEL``.

Needs the extra ``serve``: ``python -m pip install 'clusterfusion-lm[serve]'``. From Python,
:func:`build_app` makes an ASGI application of an engine and :class:`Settings`.
On many machines: :mod:`clusterfusion.serve.ray`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterfusion.serve.app import build_app
    from clusterfusion.serve.settings import Settings

__all__ = ["Settings", "build_app"]


def __getattr__(name: str) -> Any:
    # Late, so that the program can say what to install where the extra is missing.
    if name == "build_app":
        from clusterfusion.serve.app import build_app

        return build_app
    if name == "Settings":
        from clusterfusion.serve.settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
