"""Models by their names on the hub: the cache, downloads and what goes wrong with them.

huggingface_hub reads its environment when it is imported, so each case runs in a process of its
own, against a hub on loopback (hub_server.py).
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from conftest import ROOT
from hub_server import Hub, HubModel, running_hub

pytest.importorskip("huggingface_hub")

PROGRAM = os.environ.get("CLUSTERFUSION_BIN")
needs_program = pytest.mark.skipif(PROGRAM is None, reason="CLUSTERFUSION_BIN is not set")
HF = shutil.which("hf", path=os.path.dirname(sys.executable)) or shutil.which("hf")
needs_hf = pytest.mark.skipif(HF is None, reason="huggingface_hub came without its program hf")
NAME = "EleutherAI/pythia-tiny"
TOKEN = "hf_test"
# In any model's repository, and of no use here.
OTHER_FILES = {"README.md": b"# Pythia", "flax_model.msgpack": b"x" * 100, ".gitattributes": b""}


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Of a small model with a tokenizer; its weights are large enough to be redirected."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    return read_files(write_random_checkpoint(folder, tokenizer="train", vocab_size=300))


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory) -> dict[str, bytes]:
    """The same with other weights, in shards of torch's format."""
    folder = tmp_path_factory.mktemp("hub") / "torch"
    return read_files(
        write_random_checkpoint(
            folder, tokenizer="train", vocab_size=300, seed=1, shards=3, weights="torch"
        )
    )


@pytest.fixture
def hub(files):
    """A hub with one public model."""
    with running_hub() as hub:
        hub.models[NAME] = HubModel()
        hub.models[NAME].add("main", files | OTHER_FILES)
        yield hub


class Client:
    """Runs Python code and the program as a user of the hub, with a cache of its own."""

    def __init__(self, hub: Hub, folder: Path):
        self.cache = folder / "hub-cache"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "CLUSTERFUSION_HUB"))
        }
        self.environment |= {
            "HF_HOME": str(folder / "hf-home"),
            "HF_HUB_CACHE": str(self.cache),
            "HF_ENDPOINT": hub.endpoint,
            "NO_PROXY": "*",
        }
        self.folder = folder

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess:
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def python(self, code: str, **environment: str) -> str:
        """Standard output of code that uses clusterfusion."""
        ended = self.run([sys.executable, "-c", textwrap.dedent(code)], **environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def logits(self, *, revision: str | None = None, **environment: str) -> np.ndarray:
        code = f"""
            import clusterfusion, json
            engine = clusterfusion.Engine({NAME!r}, revision={revision!r}, device="cpu")
            print(json.dumps(engine.logits([1, 2, 3]).astype(float).tolist()))
        """
        return np.array(json.loads(self.python(code, **environment)), np.float32)

    def error(self, *, revision: str | None = None, **environment: str) -> tuple[str, str]:
        """The type and the message of the exception that Engine() ends with."""
        code = f"""
            import clusterfusion, json
            try:
                clusterfusion.Engine({NAME!r}, revision={revision!r}, device="cpu")
            except Exception as error:
                print(json.dumps([type(error).__name__, str(error)]))
        """
        kind, message = json.loads(self.python(code, **environment))
        return kind, message

    def snapshot(self, commit: str) -> set[str]:
        folder = self.cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / commit
        return {path.name for path in folder.iterdir()}


@pytest.fixture
def client(hub, tmp_path) -> Client:
    return Client(hub, tmp_path)


def expected_logits(files: dict[str, bytes], folder: Path) -> np.ndarray:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return clusterfusion.Engine(folder, device="cpu").logits([1, 2, 3])


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"XDG_CACHE_HOME": ""},
        {"HF_HOME": "/y/"},
        {"HF_HOME": "~/y", "XDG_CACHE_HOME": "/x"},
        {"HF_HOME": ""},
        {"HUGGINGFACE_HUB_CACHE": "$HOME/${USER}/z$NO", "HF_HOME": "/y"},
        {"HF_HUB_CACHE": "~root/$HF_HOME", "HF_HOME": "y", "HUGGINGFACE_HUB_CACHE": "/z"},
        {"HF_HUB_CACHE": "a$/$$HOME/${HOME"},
    ],
    ids=str,
)
def test_cache_folder_is_that_of_huggingface_hub(client, environment):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        client.environment.pop(name, None)
    code = """
        import os
        from clusterfusion import _native
        from huggingface_hub.constants import HF_HUB_CACHE as theirs
        ours = _native.hub_cache()
        print(os.path.normpath(ours) == os.path.normpath(theirs), ours, theirs)
    """
    assert client.python(code, USER="u", **environment).startswith("True")


def test_downloads_what_is_needed_and_once(hub, client, files, tmp_path):
    expected = expected_logits(files, tmp_path / "local")
    np.testing.assert_array_equal(client.logits(), expected)
    (commit,) = hub.models[NAME].commits
    assert client.snapshot(commit) == set(files)
    assert "model.safetensors" in files
    hub.requests.clear()
    np.testing.assert_array_equal(client.logits(), expected)
    assert hub.requests == []


def test_prefers_safetensors(hub, client, files, torch_files):
    hub.models[NAME].add("both", torch_files | files)
    client.logits(revision="both")
    commit = hub.models[NAME].revisions["both"]
    assert client.snapshot(commit) == set(files)


def test_downloads_shards_of_torch(hub, client, torch_files, tmp_path):
    """And nothing that the index does not name."""
    commit = hub.models[NAME].add("main", torch_files | {"pytorch_model-old.bin": b"x"})
    expected = expected_logits(torch_files, tmp_path / "local")
    np.testing.assert_array_equal(client.logits(), expected)
    assert client.snapshot(commit) == set(torch_files)


def test_revisions(hub, client, files, torch_files, tmp_path):
    commit = hub.models[NAME].add("step3000", torch_files)
    other = expected_logits(torch_files, tmp_path / "other")
    main = expected_logits(files, tmp_path / "main")
    assert not np.array_equal(other, main)
    np.testing.assert_array_equal(client.logits(revision="step3000"), other)
    np.testing.assert_array_equal(client.logits(), main)
    hub.requests.clear()
    np.testing.assert_array_equal(client.logits(revision="step3000"), other)
    np.testing.assert_array_equal(client.logits(revision=commit), other)
    assert hub.requests == []


def test_a_commit_hash_alone(hub, client, files, tmp_path):
    (commit,) = hub.models[NAME].commits
    expected = expected_logits(files, tmp_path / "local")
    np.testing.assert_array_equal(client.logits(revision=commit), expected)


def test_tokenizer_alone(hub, client, files):
    code = f"""
        import clusterfusion
        print(clusterfusion.Tokenizer({NAME!r}).decode(
            clusterfusion.Tokenizer({NAME!r}).encode("the best of times")))
    """
    assert client.python(code) == "the best of times"
    (commit,) = hub.models[NAME].commits
    assert client.snapshot(commit) == {"tokenizer.json"}
    # The model is not complete by that.
    client.logits()
    assert client.snapshot(commit) == set(files)


def test_a_tokenizer_comes_after_the_weights(hub, client, files):
    """The cache may have been filled by others, who had no use for it."""
    client.python(f"""
        import huggingface_hub
        for file in ("config.json", "model.safetensors"):
            huggingface_hub.hf_hub_download({NAME!r}, file)
    """)
    code = f"import clusterfusion; print(clusterfusion.Engine({NAME!r}).info.has_tokenizer)"
    assert client.python(code, HF_HUB_OFFLINE="1") == "False"
    assert client.python(code) == "True"


def test_a_model_without_tokenizer(hub, client, files):
    bare = {name: content for name, content in files.items() if name != "tokenizer.json"}
    hub.models[NAME].add("main", bare)
    code = f"import clusterfusion; print(clusterfusion.Engine({NAME!r}).info.has_tokenizer)"
    assert client.python(code) == "False"
    assert client.python(code) == "False"
    hub.requests.clear()
    assert client.python(code) == "False"
    assert hub.requests == []  # that there is none has been noted down


def test_local_folder_wins(hub, client, files):
    folder = client.folder / NAME
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    code = f"import clusterfusion; print(clusterfusion.Engine({NAME!r}).info.path)"
    assert client.python(code) == NAME
    assert hub.requests == []
    kind, message = client.error(revision="step1")
    assert kind == "ValueError"
    assert "step1" in message
    assert "local path" in message


# Access.


def test_the_module_is_a_program(tmp_path):
    """It prints the folder and nothing else."""
    command = [sys.executable, "-m", "clusterfusion.hub"]
    ended = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{tmp_path}\n", "")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [*command, NAME], capture_output=True, text=True, timeout=60, env=environment
    )
    assert ended.returncode == 1 and "HF_HUB_OFFLINE is set" in ended.stdout
    assert ended.stderr == ""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_token_goes_to_the_hub_alone(hub, client):
    hub.tokens.add(TOKEN)
    hub.models[NAME].private = True
    hub.models[NAME].readers.add(TOKEN)
    client.logits(HF_TOKEN=TOKEN)
    asked = [request for request in hub.requests if NAME in request.path]
    redirected = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert {request.token for request in asked} == {TOKEN}
    assert redirected
    assert {(request.host, request.token) for request in redirected} == {("localhost", None)}


@pytest.mark.parametrize("token", [None, TOKEN])
def test_private_or_not_there(hub, client, token):
    hub.tokens.add(TOKEN)
    hub.models[NAME].private = True
    kind, message = client.error(**({"HF_TOKEN": token} if token else {}))
    assert kind == "FileNotFoundError"
    assert f"no such folder: {NAME}" in message
    assert hub.endpoint in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("token", [None, TOKEN])
def test_gated(hub, client, token):
    hub.tokens.add(TOKEN)
    hub.models[NAME].gated = True
    kind, message = client.error(**({"HF_TOKEN": token} if token else {}))
    assert kind == "PermissionError"
    assert "accept its terms" in message
    assert f"{hub.endpoint}/{NAME}" in message


def test_wrong_token(client):
    kind, message = client.error(HF_TOKEN="hf_wrong")
    assert kind == "PermissionError"
    assert "401" in message
    assert "HF_TOKEN" in message


def test_no_such_revision(client):
    kind, message = client.error(revision="step1")
    assert kind == "FileNotFoundError"
    assert "'step1'" in message


def test_no_weights(hub, client, files):
    hub.models[NAME].add("main", {"config.json": files["config.json"], "model.gguf": b"x"})
    kind, message = client.error()
    assert kind == "NoWeightsError"
    assert "no weights" in message
    assert "model.gguf" in message


# The network.


def test_resumes(hub, client, tmp_path):
    """From the last 10 MB that were written; older versions of huggingface_hub on the next call."""
    folder = tmp_path / "large"
    write_random_checkpoint(folder, hidden_size=256, num_layers=1, vocab_size=30_000)
    hub.models[NAME].add("main", read_files(folder))
    hub.break_downloads = 1
    client.python(f"""
        import clusterfusion
        try:
            clusterfusion.Engine({NAME!r})
        except OSError as error:
            assert "call again" in str(error), error
            clusterfusion.Engine({NAME!r})
    """)
    ranges = [request.range for request in hub.requests if request.range is not None]
    assert ranges == [f"bytes={10 << 20}-"]
    expected = clusterfusion.Engine(folder, device="cpu").logits([1, 2, 3])
    np.testing.assert_array_equal(client.logits(), expected)


def test_interrupted(hub, client, files, tmp_path):
    """What was killed in the middle is not taken for complete, and is completed later."""
    hub.break_downloads = 1
    hub.hold.clear()
    process = client.start(
        [sys.executable, "-c", f"import clusterfusion; clusterfusion.Engine({NAME!r})"]
    )
    assert hub.is_half_sent.wait(300)
    process.kill()
    process.communicate()
    hub.hold.set()
    kind, message = client.error(HF_HUB_OFFLINE="1")
    assert kind == "FileNotFoundError"
    assert "HF_HUB_OFFLINE" in message
    np.testing.assert_array_equal(client.logits(), expected_logits(files, tmp_path / "local"))


def test_ctrl_c(hub, client):
    hub.break_downloads = 1
    hub.hold.clear()
    process = client.start(
        [sys.executable, "-c", f"import clusterfusion; clusterfusion.Engine({NAME!r})"]
    )
    assert hub.is_half_sent.wait(300)
    process.send_signal(signal.SIGINT)
    hub.hold.set()
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err


def test_offline(hub, client, files, tmp_path):
    kind, message = client.error(HF_HUB_OFFLINE="1")
    assert kind == "FileNotFoundError"
    assert "HF_HUB_OFFLINE" in message
    assert f"hf download {NAME}" in message
    client.logits()
    hub.requests.clear()
    expected = expected_logits(files, tmp_path / "local")
    np.testing.assert_array_equal(client.logits(HF_HUB_OFFLINE="1"), expected)
    assert hub.requests == []


def test_no_hub(client):
    endpoint = "http://127.0.0.1:1"
    kind, message = client.error(HF_ENDPOINT=endpoint)
    assert kind == "OSError"
    assert endpoint in message
    assert NAME in message


def test_without_huggingface_hub(client):
    code = f"""
        import sys
        sys.modules["huggingface_hub"] = None
        import clusterfusion
        try:
            clusterfusion.Engine({NAME!r})
        except FileNotFoundError as error:
            print(error)
    """
    message = client.python(code)
    assert f"hf download {NAME}" in message
    assert "pip install 'clusterfusion-lm[hub]'" in message


# The program, and the documentation.


def info(ended: subprocess.CompletedProcess) -> dict:
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["model"]


@needs_program
@needs_hf
def test_plain_program_says_what_downloads(hub, client, torch_files):
    """The command of its message is run, and then the program finds the model."""
    hub.models[NAME].add("step3000", torch_files)
    command = [PROGRAM, "info", NAME, "--revision", "step3000", "--json"]
    ended = client.run(command)
    assert ended.returncode == 1
    assert str(client.cache) in ended.stderr
    line = ended.stderr.split("download it: ")[1].split("  (")[0]
    assert line == f"hf download {NAME} --revision step3000"
    downloaded = client.run([HF, *shlex.split(line)[1:]])
    assert downloaded.returncode == 0, downloaded.stderr
    hub.requests.clear()
    folder = Path(info(client.run(command))["path"])
    assert folder.name == hub.models[NAME].revisions["step3000"]
    assert hub.requests == []


@needs_program
def test_program_of_an_installation_downloads(hub, client, files):
    python = {"CLUSTERFUSION_HUB_PYTHON": sys.executable}
    ended = client.run([PROGRAM, "tokenize", NAME, "-p", "the best", "--count"], **python)
    assert (ended.returncode, ended.stdout.strip().isdigit()) == (0, True), ended.stderr
    (commit,) = hub.models[NAME].commits
    assert client.snapshot(commit) == {"tokenizer.json"}
    ended = client.run([PROGRAM, "info", NAME, "--json"], **python)
    assert Path(info(ended)["path"]).name == commit
    assert client.snapshot(commit) == set(files)
    assert "model.safetensors" in ended.stderr or "%" in ended.stderr  # the progress bar
    hub.requests.clear()
    assert info(client.run([PROGRAM, "info", NAME, "--json"]))["num_parameters"] > 0
    assert hub.requests == []


WHEEL_PROGRAM = Path(sys.executable).with_name("clusterfusion")


@pytest.mark.skipif(not WHEEL_PROGRAM.exists(), reason="no wheel is installed for this Python")
def test_program_of_a_wheel_downloads_by_the_python_beside_it(hub, client, files):
    ended = client.run([WHEEL_PROGRAM, "info", NAME, "--json"])
    assert info(ended)["num_parameters"] > 0
    (commit,) = hub.models[NAME].commits
    assert client.snapshot(commit) == set(files)


@needs_program
def test_program_downloads_quietly(client):
    python = {"CLUSTERFUSION_HUB_PYTHON": sys.executable}
    ended = client.run([PROGRAM, "info", NAME, "--json", "-q"], **python)
    assert info(ended)
    assert ended.stderr == ""


@needs_program
def test_errors_of_the_program_of_an_installation(hub, client):
    python = {"CLUSTERFUSION_HUB_PYTHON": sys.executable}
    ended = client.run([PROGRAM, "info", NAME, "--revision", "step1"], **python)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("clusterfusion: error: ")
    assert "no revision 'step1'" in ended.stderr
    hub.models[NAME].gated = True
    ended = client.run([PROGRAM, "generate", NAME, "-p", "a"], **python)
    assert ended.returncode == 1
    assert "accept its terms" in ended.stderr
    ended = client.run([PROGRAM, "info", NAME], CLUSTERFUSION_HUB_PYTHON="/no/python")
    assert ended.returncode == 1
    assert "/no/python" in ended.stderr


@needs_program
@needs_hf
def test_commands_of_the_documentation(hub, client, torch_files):
    """docs/checkpoints.md, with the program and hf on PATH."""
    hub.models["EleutherAI/pythia-14m"] = HubModel()
    commit = hub.models["EleutherAI/pythia-14m"].add("step3000", torch_files)
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (code,) = re.findall("^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    text, folder = client.python(code).rsplit("\n", 1)
    assert text
    assert Path(folder).name == commit
    shutil.rmtree(client.cache)
    (commands,) = re.findall("^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    programs = client.folder / "bin"
    programs.mkdir()
    (programs / "clusterfusion").symlink_to(Path(PROGRAM).resolve())
    path = os.pathsep.join([str(programs), os.path.dirname(HF), os.environ["PATH"]])
    ended = client.run(["bash", "-euc", commands], PATH=path)
    assert ended.returncode == 0, ended.stderr
    assert text in ended.stdout
    assert f"snapshots/{commit}" in ended.stdout
