"""The package as it is installed: version, types, documentation, loading."""

import inspect
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import clusterfusion
import pytest
from clusterfusion import _native
from conftest import ROOT


def test_one_version():
    """CMakeLists.txt holds it; the library is built with it, and the wheel is named after it."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (version,) = re.findall(r"project\(ClusterFusion VERSION ([0-9.]+)", text)
    assert clusterfusion.__version__ == version
    assert type(clusterfusion.__version__) is str
    try:
        installed = metadata.version("clusterfusion-lm")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, but taken from a build folder")
    assert installed == version


def test_types_are_published():
    assert (resources.files(clusterfusion) / "py.typed").is_file()


def test_all_names_exist_and_are_documented():
    for name in clusterfusion.__all__:
        value = getattr(clusterfusion, name)
        if not inspect.isclass(value):
            continue
        assert inspect.getdoc(value), name
        for member, function in inspect.getmembers(value, inspect.isfunction):
            if not member.startswith("_"):
                assert inspect.getdoc(function), f"{name}.{member}"


def test_options_are_documented():
    options = clusterfusion.GenerateOptions
    documented = re.findall(r"^    (\w+):", inspect.getdoc(options), re.MULTILINE)
    assert documented == list(options.__annotations__)


def test_extension_knows_no_python():
    """One binary for every Python: no symbol of the interpreter is needed, none but ours given."""
    path = _native.find_library(list(clusterfusion.__path__))
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    assert "TVMFFI" in symbols
    assert not re.search(r"\bU _?Py[A-Z_]", symbols)


def test_no_library():
    with pytest.raises(ImportError, match=r"libclusterfusion_ffi\.so is not in /nowhere.*pip"):
        _native.find_library(["/nowhere"])


def test_broken_library(tmp_path):
    path = tmp_path / "libclusterfusion_ffi.so"
    path.write_bytes(b"not a shared library")
    with pytest.raises(ImportError, match=rf"{re.escape(str(path))} cannot be loaded.*rebuild"):
        _native.load_library(path)


def test_library_of_another_version():
    library = _native.load_library(_native.find_library(list(clusterfusion.__path__)))
    with pytest.raises(ImportError, match=r"no function 'engine_fly'.*another version.*reinstall"):
        _native.find_function(library, "engine_fly")


def test_missing_dependency(tmp_path):
    """Without apache-tvm-ffi the import fails, and says what to install."""
    (tmp_path / "tvm_ffi.py").write_text("raise ImportError('not here')\n")
    package = Path(clusterfusion.__file__).parent
    program = f"import sys; sys.path[:0] = {[str(tmp_path), str(package.parent)]}; "
    result = subprocess.run(
        [sys.executable, "-c", program + "import clusterfusion"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "ImportError: clusterfusion needs the package apache-tvm-ffi" in result.stderr
    assert "pip install" in result.stderr
