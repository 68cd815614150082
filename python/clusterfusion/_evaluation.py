"""What lm-evaluation-harness asks for, as an Engine takes it. Needs no lm_eval itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clusterfusion.results import ModelConfig
from clusterfusion.tokenizer import Tokenizer

# In the order in which lm-evaluation-harness prefers them.
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILTERS = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}


def special_token_ids(
    folder: Path, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[int | None, int | None]:
    """Returns the ids of the tokens that begin and end a text, as transformers finds them.

    tokenizer_config.json names them, or else special_tokens_map.json, or else the tokenizer's class
    does; config.json has the last word where none of these does.

    Raises:
        ValueError: A file is not JSON, or names a token that the tokenizer does not have.
    """
    files = [_json_object(folder / "tokenizer_config.json")]
    files.append(_json_object(folder / "special_tokens_map.json"))
    if str(files[0].get("tokenizer_class", "")).startswith("GPTNeoXTokenizer"):
        files.append({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    ids: dict[str, int | None] = {
        "bos_token": config.bos_token,
        "eos_token": config.eos_tokens[0] if config.eos_tokens else None,
    }
    for name in ids:
        token = next((file[name] for file in files if file.get(name) is not None), None)
        if token is None:
            continue
        content = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if found is None:
            raise ValueError(
                f"{folder}: expected {name} to be a token of tokenizer.json, found {content!r}"
            )
        ids[name] = found
    return ids["bos_token"], ids["eos_token"]


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected an object, found {type(value).__name__}")
    return value


def device_name(device: str | None) -> str:
    """Returns the engine's name of a device as lm-evaluation-harness names it.

    "cuda:0" is what its program passes where the user names no device, so that this means a GPU if
    there is one, as it does for its ``hf`` model.

    Raises:
        ValueError: It is another GPU than the first, or no device of ours.
    """
    names = {None: "auto", "auto": "auto", "cpu": "cpu", "cuda": "cuda", "cuda:0": "auto"}
    if device in names:
        return names[device]
    hint = "; choose a GPU by CUDA_VISIBLE_DEVICES" if str(device).startswith("cuda:") else ""
    raise ValueError(f"device: expected auto, cpu, cuda or cuda:0, found {device!r}{hint}")


def batch_requests(batch_size: int | str, max_batch_size: int | None) -> int:
    """Returns how many requests go to the engine at once; "auto" takes the most.

    Raises:
        ValueError: It is neither a positive integer nor "auto" or "auto:N".
    """
    most = 512 if max_batch_size is None else int(max_batch_size)
    text = str(batch_size)
    if text == "auto" or text.startswith("auto:"):
        return max(1, most)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"batch_size: expected a positive integer or auto, found {batch_size!r}")
    return int(text)


def check_dtype(dtype: str | None, stored: str, device: str) -> None:
    """Checks that a dtype is the one in which the engine computes.

    Raises:
        ValueError: It is not.
    """
    name = str(dtype).removeprefix("torch.")
    # On the CPU all sums are of float32, whatever the weights are stored as.
    if dtype is None or name in ("auto", stored) or (name == "float32" and device == "cpu"):
        return
    raise ValueError(
        f"dtype: expected auto or {stored}, the checkpoint's own"
        f"{' (or float32)' if device == 'cpu' else ''}, found {name}: the engine does not convert "
        "weights"
    )


def truncate_left(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Returns a context shortened from the left so that it fits with its continuation.

    The last token is never fed: together they have at most max_length + 1 tokens.

    Raises:
        ValueError: The context or the continuation has no token, or the continuation alone does
            not fit.
    """
    if not context or not continuation or len(continuation) > max_length:
        raise ValueError(
            f"expected a context and a continuation of 1 to {max_length} tokens, found "
            f"{len(context)} and {len(continuation)}"
        )
    room = max_length + 1 - len(continuation)
    return list(context[-room:]), list(continuation)


def generate_options(
    arguments: Mapping[str, Any], default_max_tokens: int
) -> tuple[list[str], dict[str, Any]]:
    """Returns stop texts, and the options of Engine.generate(), of a task's generation_kwargs.

    Raises:
        TypeError: `until` is neither a text nor a list of texts.
        ValueError: An argument is not supported, or sampling is asked for without a temperature.
    """
    left = dict(arguments)
    until = left.pop("until", None)
    stops = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"until: expected a text or a list of texts, found {until!r}")
    limits = [left.pop(name, None) for name in _TOKEN_LIMITS]
    limit = next((limit for limit in limits if limit is not None), default_max_tokens)
    temperature = float(left.pop("temperature", None) or 0.0)
    do_sample = left.pop("do_sample", None)
    if do_sample and temperature == 0:
        raise ValueError("temperature: expected a number above 0 with do_sample, found 0")
    options = {
        "max_new_tokens": int(limit),
        "temperature": 0.0 if do_sample is False else temperature,
    }
    for name, kind in _FILTERS.items():
        if (value := left.pop(name, None)) is not None:
            options[name] = kind(value)
    if left.pop("num_beams", 1) != 1:
        raise ValueError("num_beams: expected 1, the engine has no beam search")
    if left:
        raise ValueError(
            f"generation_kwargs: expected until, do_sample, temperature, {', '.join(_FILTERS)} and "
            f"{', '.join(_TOKEN_LIMITS)}, found {sorted(left)}"
        )
    return list(stops), options


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first stop; of stops that overlap the first in the list counts."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
