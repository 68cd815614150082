"""The tests of the layer calls' options against float64, once more with the tensors on a GPU.

Skipped without a GPU; with CLUSTERFUSION_TEST_DEVICE=cuda that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_layer_options
from clusterfusion import ops
from layer_reference import bfloat16
from reference_model import relative_error
from test_layer_options import (  # noqa: F401
    test_families,
    test_grouped_heads,
    test_grouped_heads_without_biases,
    test_named_head_dim_is_the_usual_one,
    test_one_position_for_all_rows,
    test_pages,
    test_parts_of_other_layers,
    test_positions_of_one_row_without_pages,
    test_random_layers,
    test_rows_outside,
    test_rows_that_are_all_outside,
    test_table_of_rows_that_lie_apart,
    test_tokens_of_one_sequence,
    test_views_of_one_allocation,
    test_without_a_bias_of_the_mlp,
)

torch = pytest.importorskip("torch", reason="torch is not installed")
# Another device tries the way there and back.
DEVICE = os.environ.get("CLUSTERFUSION_TEST_DEVICE", "cuda")
if "CLUSTERFUSION_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no GPU to test on", allow_module_level=True)

TYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
TYPES["bfloat16"] = torch.bfloat16
# The streaming kernels round what enters a product too, as tests/gpu/layer_test.cpp says.
LIMITS = {"float16": 2e-3, "bfloat16": 1.6e-2}


# With as many heads of keys and values as heads one of the orders streams, and sums otherwise.
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_orders_of_rows_give_the_same_bits(num_kv_heads: int) -> None:
    test_layer_options.test_orders_of_rows_give_the_same_bits(num_kv_heads)


# A row alone streams through the second half of any MLP, and sums otherwise.
@pytest.mark.parametrize("rows", range(1, 17))
def test_rows(rows: int) -> None:
    test_layer_options.test_rows(rows, down_streams=rows > 1 and not DEVICE.startswith("cpu"))


class Allocations:
    """Copies on the GPU of all that arrays are views of, so that views of one stay so."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def move(self, value: Any) -> Any:
        """Give a tensor for an array, and anything else as it is."""
        if not isinstance(value, np.ndarray):
            return value
        if value.size == 0:
            return torch.empty(value.shape, dtype=TYPES[value.dtype.name], device=DEVICE)
        root = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in self._copies:
            memory = np.frombuffer(root.tobytes(), np.uint8)
            self._copies[id(root)] = root, torch.from_numpy(memory.copy()).to(DEVICE)
        memory = self._copies[id(root)][1].view(TYPES[value.dtype.name])
        strides = [stride // value.itemsize for stride in value.strides]
        first = (value.ctypes.data - root.ctypes.data) // value.itemsize
        return memory.as_strided(value.shape, strides, first)

    def take_back(self) -> None:
        """Put what the GPU has written into the arrays."""
        for root, memory in self._copies.values():
            if root.flags.writeable:
                flat = memory.cpu().numpy().view(root.dtype)
                root[...] = np.ndarray(root.shape, root.dtype, flat, strides=root.strides)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(bfloat16)
    return tensor.cpu().numpy()


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer call that takes arrays to the GPU and back."""

    def call(*arguments: Any, **options: Any) -> Any:
        memory = Allocations()
        moved = {name: memory.move(value) for name, value in options.items()}
        results = function(*map(memory.move, arguments), **moved)
        memory.take_back()
        return tuple(map(to_numpy, results)) if isinstance(results, tuple) else to_numpy(results)

    return call


class GpuOps:
    attention_mlp_up = staticmethod(on_gpu(ops.attention_mlp_up))
    decoder_layer = staticmethod(on_gpu(ops.decoder_layer))
    mlp_down = staticmethod(on_gpu(ops.mlp_down))


def assert_close(values: np.ndarray, expected: np.ndarray, slack: float = 0.0) -> None:
    assert values.shape == expected.shape
    limit = max(LIMITS[values.dtype.name], slack)
    assert relative_error(values.astype(np.float64), expected) <= limit


@pytest.fixture(autouse=True)
def arrays_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_layer_options, "ops", GpuOps)
    monkeypatch.setattr(test_layer_options, "assert_close", assert_close)
