"""The playground in a real browser, where Chromium is installed."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

import clusterfusion
import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from conftest import ROOT
from serving import serving, wait_for

PROMPT = "It was a cold evening in November, and the old house"


class Browser:
    """Headless Chromium by its DevTools protocol: a WebSocket, spoken here in few lines."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if program is None:
            pytest.skip("chromium is not installed")
        self._process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                "--window-size=1000,760",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = folder / "DevToolsActivePort"
        port = int(wait_for(lambda: told.exists() and told.read_text().split()[:1])[0])
        pages = wait_for(
            lambda: [
                page
                for page in httpx.get(f"http://127.0.0.1:{port}/json").json()
                if page["type"] == "page"
            ]
        )
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        path = pages[0]["webSocketDebuggerUrl"].split(str(port), 1)[1]
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = self._socket.makefile("rb")
        while self._file.readline() != b"\r\n":
            pass
        self._number = 0

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)

    def call(self, method: str, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        data = json.dumps(message).encode()
        # One masked frame with a 16-bit length; a mask of zeros leaves the data as it is.
        self._socket.sendall(b"\x81\xfe" + struct.pack(">H", len(data)) + bytes(4) + data)
        while True:
            answer = json.loads(self._frame())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _frame(self) -> bytes:
        size = self._file.read(2)[1] & 0x7F
        if size == 126:
            (size,) = struct.unpack(">H", self._file.read(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._file.read(8))
        return self._file.read(size)

    def run(self, script: str) -> object:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> object:
        return wait_for(lambda: self.run(script))


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "browser")
    yield browser
    browser.close()


def test_playground(browser, demo_model, tmp_path):
    options = {"max_new_tokens": 120, "temperature": 0.8, "top_p": 0.95, "seed": 1, "logprobs": 5}
    alone = clusterfusion.Engine(demo_model).generate(PROMPT, **options)
    name = ["--served-model-name", "clusterfusion/demo"]
    with serving(demo_model, tmp_path, *name) as server:
        browser.call("Page.navigate", url=server.url + "/")
        browser.wait_for("document.readyState == 'complete' && !!document.getElementById('go')")
        browser.wait_for("document.getElementById('model').textContent.includes('demo')")
        browser.run("document.getElementById('seed').value = '1'")
        browser.run("document.getElementById('go').click()")
        browser.wait_for("document.body.dataset.done == 'yes'")
        assert browser.run("document.getElementById('error').textContent") == ""
        shown = browser.run("document.getElementById('output').textContent")
        assert shown == PROMPT + alone.text
        figures = browser.run("document.getElementById('figures').textContent")
        assert "14 + 120 tokens" in figures and "tokens/s" in figures
        assert "% of the memory ceiling" in figures
        # What a token's tip tells is what the engine says of it.
        spot = browser.run(
            "(() => { const box = document.querySelectorAll('.token')[9].getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
        browser.wait_for("!document.getElementById('tip').hidden")
        tip = browser.run("document.getElementById('tip').textContent")
        assert f"  {alone.logprobs[9].logprob:.3f}  " in tip.split("\n")[0]
        assert len(tip.split("\n")) in (6, 7)
        picture = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
        assert picture.startswith(b"\x89PNG")
        if "CLUSTERFUSION_SCREENSHOT" in os.environ:  # for README
            (ROOT / os.environ["CLUSTERFUSION_SCREENSHOT"]).write_bytes(picture)

        # A request that fails says why; one that is stopped ends in the engine too.
        browser.run("document.body.dataset.done = ''")
        browser.run("document.getElementById('prompt').value = 'x '.repeat(3000)")
        browser.run("document.getElementById('go').click()")
        browser.wait_for("document.body.dataset.done == 'yes'")
        error = browser.run("document.getElementById('error').textContent")
        assert "maximum context length is 1024 tokens" in error
        browser.run("document.body.dataset.done = ''")
        browser.run("document.getElementById('prompt').value = 'It was'")
        browser.run("document.getElementById('max_tokens').value = '1000'")
        browser.run("document.getElementById('go').click()")
        browser.wait_for("document.querySelectorAll('.token').length > 1")
        browser.run("document.getElementById('halt').click()")
        browser.wait_for("document.body.dataset.done == 'yes'")
        assert browser.run("document.getElementById('error').textContent") == ""
        wait_for(lambda: server.running() == 0)
        time.sleep(0.1)
        assert server.lines()[-1]["status"] in (200, 499)


def test_page_needs_nothing_from_elsewhere(demo_model):
    """No other host, no inline script: what is there is ours."""
    folder = Path(clusterfusion.__file__).parent / "serve/page"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["index.html", "playground.js", "style.css"]
    for file in files:
        assert "http:" not in file.read_text() and "https:" not in file.read_text()
