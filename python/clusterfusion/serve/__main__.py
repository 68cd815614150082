"""``clusterfusion serve MODEL``, or ``python -m clusterfusion.serve MODEL``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from clusterfusion import Engine
from clusterfusion._command_line import about, add_engine_options, number, open_engine, report

_LONGEST_SECONDS = 365 * 24 * 3600
_EXAMPLE = """\
Exit codes: 1 failed (a file, memory, the port, ...); 2 misused (an option is wrong); 130 and 143
ended by Ctrl-C and SIGTERM.

Example:
  clusterfusion serve models/demo --port 8000
  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "It was a dark", "max_tokens": 20}'
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the server until a signal ends it.

    Args:
        arguments: The command line behind the program's name; None for the process's.

    Returns:
        The exit code.
    """
    try:
        return _serve(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return 130


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logging.captureWarnings(True)
    try:
        from clusterfusion.serve.app import build_app
        from clusterfusion.serve.server import Server, listen
    except ImportError as error:
        install = "python -m pip install 'clusterfusion-lm[serve]'"
        return report(ImportError(f"{error}; the server needs the extra 'serve': {install}"))
    try:
        settings = _settings(options)
        listener = listen(options.host, options.port)
        engine = _engine(options)
        app = build_app(engine, settings, options.max_sequences)
    except (OSError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
        return report(error)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logging.info("%s", about(engine))
    logging.info("serving %s on http://%s:%d", app.state.service.model_names[0], shown, port)
    Server(app, settings).run(sockets=[listener])
    return 0


def _engine(options: argparse.Namespace) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        return open_engine(
            options,
            mode=options.mode,
            max_sequences=options.max_sequences,
            kv_bytes=options.kv_bytes,
            prefix_cache=not options.no_prefix_cache,
        )


def _settings(options: argparse.Namespace) -> Any:
    from clusterfusion.serve.settings import Settings, read_api_keys

    keys = [] if options.api_key_file is None else read_api_keys(options.api_key_file)
    return Settings(
        model_names=options.served_model_name or [options.model],
        max_waiting=options.max_waiting,
        timeout=options.timeout,
        body_timeout=options.body_timeout,
        stall_timeout=options.stall_timeout,
        grace=options.grace,
        max_body_bytes=options.max_body_bytes,
        api_keys=keys,
        cors_origins=options.cors_origin or (),
        strict=options.strict,
        log_json=options.log_json,
        log_prompts=options.log_prompts,
        chat_template=options.chat_template,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clusterfusion serve",
        description="Serve a model by the OpenAI API.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, or name on the hub")
    add("--host", type=_address, default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=number(int, 0, 65535), default=8000, help="0 for any free one (8000)")
    add("--served-model-name", action="append", metavar="NAME", help="what requests may call it")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template, instead of the model's")

    engine = add_engine_options(parser)
    engine(
        "--mode",
        default="throughput",
        choices=["latency", "throughput"],
        help="what a GPU is to be quick at (throughput)",
    )
    engine("--max-sequences", type=number(int, 1), default=256, help="texts at once (256)")
    engine("--kv-bytes", type=number(int, 0), default=0, help="for keys and values (what is left)")
    engine("--no-prefix-cache", action="store_true", help="share nothing between prompts")

    limits = parser.add_argument_group("limits").add_argument
    limits("--max-waiting", type=number(int, 0), default=2048, help="texts in the queue (2048)")
    limits("--timeout", type=number(float, 0), default=0, help="seconds a request; 0: any (0)")
    limits("--body-timeout", type=number(float, 0.1), default=30, help="s for it to arrive (30)")
    limits("--stall-timeout", type=number(float, 0.1), default=30, help="s without reading (30)")
    limits(
        "--grace",
        type=number(float, 0, _LONGEST_SECONDS),
        default=30,
        help="seconds at the end (30)",
    )
    limits("--max-body-bytes", type=number(int, 1), default=8 << 20, help="of a request (8 MiB)")
    limits("--strict", action="store_true", help="refuse fields that are not known")

    access = parser.add_argument_group("access and logs").add_argument
    access("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; without: no keys")
    access("--cors-origin", action="append", metavar="ORIGIN", help="pages that may ask; * for all")
    access("--log-json", action="store_true", help="log lines in JSON")
    access("--log-prompts", action="store_true", help="show prompts in log lines")
    return parser


def _address(text: str) -> str:
    if not text:  # which the system would take for all of its addresses
        raise argparse.ArgumentTypeError("expected an address, found ''; 0.0.0.0 is for all")
    return text


if __name__ == "__main__":
    sys.exit(main())
