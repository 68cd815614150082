"""What the programs of this package share."""

from __future__ import annotations

import argparse
from typing import Any

from clusterfusion.engine import Engine


def about(engine: Engine) -> str:
    """The line that says where a model runs, and why there."""
    info = engine.info
    return f"device: {info.device}, {info.device_description} ({info.device_reason})"


def number(kind: type[int] | type[float], least: float, most: float = float("inf")) -> Any:
    """A type of argparse: numbers from `least` to `most`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not least <= value <= most:
            limits = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {limits}, found {text}")
        return value

    parse.__name__ = "integer" if kind is int else "number"
    return parse
