"""The interpreter ends while daemon threads are inside calls: silently, with the program's code."""

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 120
TEXT = "It was a dark and stormy night, and the old gentleman had not come home. "

# What a daemon thread does over and over; `engine` is an open engine.
CALLS = {
    "generate": f"engine.generate({TEXT!r}, max_new_tokens=100)",
    "stream": f"for _ in engine.stream({TEXT!r}, max_new_tokens=100): pass",
    "score": f"engine.score({TEXT!r} * 5)",
    "logits": f"engine.logits({TEXT!r} * 5)",
    "loglikelihood": f"engine.loglikelihood([{TEXT!r}] * 20, [' And'] * 20, progress=print_none)",
    "perplexity": f"engine.perplexity({TEXT!r} * 20)",
    "hidden_states": f"engine.hidden_states({TEXT!r} * 5)",
    "statistics": "engine.serving_statistics()",
    "encode": f"engine.encode({TEXT!r} * 20)",
    "open": "clusterfusion.Engine(sys.argv[1], 'cpu')",
    "caught": "\n".join(
        (
            "try:",
            f"            engine.generate({TEXT!r}, max_new_tokens=100)",
            "        except Exception as error:",
            "            print(error, file=sys.stderr)",
        )
    ),
}

PROGRAM = """
import sys, threading, time
import clusterfusion

def print_none(done, total):
    pass

engine = clusterfusion.Engine(sys.argv[1], "cpu")

def work():
    while True:
        begun.set()
        {call}

begun = threading.Event()
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.parametrize("call", CALLS)
def test_daemon_threads_inside_calls(demo_model: Path, call: str) -> None:
    for seconds in (0, 0.02):
        ended = run(PROGRAM.format(call=CALLS[call]), demo_model, seconds)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_an_exit_code_is_kept(demo_model: Path) -> None:
    program = PROGRAM.format(call=CALLS["generate"]) + "sys.exit(7)\n"
    ended = run(program, demo_model, 0.02)
    assert (ended.returncode, ended.stderr) == (7, "")


def test_exit_handlers_may_generate_and_join(demo_model: Path) -> None:
    """Also one that was registered first, and so runs last."""
    first = """
import atexit

@atexit.register
def last_words():
    for thread in threads:
        thread.join()
    print(len(engine.generate("It was", max_new_tokens=3).tokens))
"""
    ended = run(first + PROGRAM.format(call=CALLS["stream"]), demo_model, 0.02)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3\n", "")


def test_other_threads_end_their_calls_first(demo_model: Path) -> None:
    """The interpreter joins threads that are no daemons; nothing is cut off there."""
    program = """
import sys, threading
import clusterfusion
engine = clusterfusion.Engine(sys.argv[1], "cpu")
def work():
    print(len(engine.generate("It was", max_new_tokens=50, ignore_eos=True).tokens))
threading.Thread(target=work).start()
"""
    ended = run(program, demo_model)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "50\n", "")


def test_a_forked_process_does_not_wait_for_its_parents_threads(demo_model: Path) -> None:
    fork = """
import os
child = os.fork()
if child == 0:
    began = time.monotonic()
    import atexit
    atexit._run_exitfuncs()
    os._exit(time.monotonic() - began > 5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ended = run(PROGRAM.format(call=CALLS["score"]) + fork, demo_model, 0.02)
    assert (ended.returncode, ended.stdout) == (0, "0\n")
