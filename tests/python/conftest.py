"""What several tests share."""

import os
import signal
from pathlib import Path

# Before anything imports NumPy, for the processes that tests start as well: on the small matrices
# of the float64 models, the threads of its BLAS spend most of their time on waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import clusterfusion
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files with a test of half a minute and more.
LONGEST = ("test_smollm2.py", "test_serve_many_clients.py", "test_researchers_day.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that processes that share the files end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and programs inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the trained model that ships with the project."""
    folder = ROOT / "models" / "demo"
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"{folder / 'model.safetensors'} is not there")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the texts and the tokenizer that are not part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def gpu(demo_model) -> str:
    """The device of the GPU tests: "cuda", or what CLUSTERFUSION_TEST_DEVICE names.

    With that variable a device that cannot be used is an error; without it, a reason to skip.
    """
    device = os.environ.get("CLUSTERFUSION_TEST_DEVICE")
    if device is None:
        try:
            clusterfusion.Engine(demo_model, device="cuda")
        except NotImplementedError as reason:
            pytest.skip(f"no GPU to test on: {reason}")
    return device or "cuda"


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The CMake build folder that CLUSTERFUSION_BUILD_DIR names."""
    if "CLUSTERFUSION_BUILD_DIR" not in os.environ:
        pytest.skip("CLUSTERFUSION_BUILD_DIR is not set")
    return Path(os.environ["CLUSTERFUSION_BUILD_DIR"])
