"""Checkpoints by their names on the Hugging Face hub, downloaded where the local cache lacks them.

Downloading is left to the package ``huggingface_hub`` (``pip install 'clusterfusion-lm[hub]'``):
its cache, its progress bars and its environment variables (HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE, ...) are what its users know.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from clusterfusion import _native
from clusterfusion._arguments import file_path, text_option

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_MODEL_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES)
# A file of all weights and the index of their shards; the first that is there counts.
_WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class NoWeightsError(FileNotFoundError):
    """A model on the hub has no weights that can be read here."""


def resolve(
    name: str | os.PathLike[str], revision: str | None = None, *, tokenizer_only: bool = False
) -> str:
    """Returns the local path of a checkpoint, after downloading it if need be.

    A file or folder that exists is returned as it is. Anything else of the form owner/name is a
    model on the hub. What the cache holds of it is used without asking the hub, so a branch stays
    where it was when it was downloaded (``hf download owner/name`` renews it). What is missing is
    downloaded: config.json, the tokenizer, and safetensors if there are any, else
    pytorch_model.bin.

    Args:
        name: A path, or a name on the hub.
        revision: Of a name on the hub: a branch, a tag or a whole commit hash; None for "main".
        tokenizer_only: Do without the weights.

    Returns:
        The path; a folder of the cache for a name on the hub.

    Raises:
        FileNotFoundError: The hub has no such model or revision, or it may not be asked
            (HF_HUB_OFFLINE, or huggingface_hub is not installed) and the cache lacks it.
        PermissionError: The hub wants a token (HF_TOKEN), another one, or terms accepted.
        OSError: Downloading failed.
        ValueError: The revision cannot be one, or the name is not on the hub and has a revision.
    """
    path = file_path("path", name)
    wanted = "" if revision is None else text_option("revision", revision)
    try:
        found = str(_native.hub_find(path, wanted, tokenizer_only))
    except FileNotFoundError as missing:
        return _download(path, wanted, tokenizer_only, missing)
    if not tokenizer_only and found != path and not (Path(found) / "tokenizer.json").exists():
        _try_tokenizer(path, Path(found).name)
    return found


def _download(name: str, revision: str, tokenizer_only: bool, missing: FileNotFoundError) -> str:
    """Downloads a model's files into the cache; returns their folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{missing}; or let it be downloaded here: "
            "python -m pip install 'clusterfusion-lm[hub]'"
        ) from None
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None)
        files = {file.rfilename for file in info.siblings or []}

        def read_index(index: str) -> Any:
            path = huggingface_hub.hf_hub_download(
                name, index, revision=info.sha, cache_dir=_native.hub_cache()
            )
            return json.loads(Path(path).read_bytes())

        wanted = _TOKENIZER_FILES if tokenizer_only else _MODEL_FILES
        needed = [file for file in wanted if file in files]
        if not tokenizer_only:
            needed += _weights(name, files, read_index)
        huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=needed, cache_dir=_native.hub_cache()
        )
    except NoWeightsError:
        raise
    except Exception as error:
        raise _clear_error(name, revision, error, missing) from error
    return str(_native.hub_find(name, revision, tokenizer_only))


def _weights(name: str, files: Collection[str], read_index: Callable[[str], Any]) -> list[str]:
    """Which of a model's files hold its weights."""
    for whole, index in _WEIGHT_FILES:
        if whole in files:
            return [whole]
        if index in files:
            shards = set(read_index(index)["weight_map"].values())
            return [index, *sorted(shards)]
    raise NoWeightsError(
        f"{name} on the hub has no weights that can be read here: expected model.safetensors, "
        f"pytorch_model.bin or shards of them, found {', '.join(sorted(files)) or 'no files'}"
    )


def _try_tokenizer(name: str, commit: str) -> None:
    """Downloads tokenizer.json to a model that was cached without it, if it can be had.

    A model without one is complete; huggingface_hub notes down that the hub has none.
    """
    try:
        import huggingface_hub
    except ImportError:
        return
    cache = _native.hub_cache()
    known = huggingface_hub.try_to_load_from_cache(
        name, "tokenizer.json", revision=commit, cache_dir=cache
    )
    if known is not None:
        return
    try:
        huggingface_hub.hf_hub_download(name, "tokenizer.json", revision=commit, cache_dir=cache)
    except Exception:  # offline, or there is none: the engine then works with token ids
        return


def _clear_error(
    name: str, revision: str, error: Exception, missing: FileNotFoundError
) -> Exception:
    """What went wrong, as one of Python's own exceptions."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{name} is gated: accept its terms at {endpoint}/{name} with your account, then set "
            "HF_TOKEN to a token of it (or run: hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{name} on the hub has no revision {revision or 'main'!r}; see "
            f"{endpoint}/{name}/branches"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"no such folder: {name}; nor is there such a model at {endpoint}, or it is private: "
            "then set HF_TOKEN (or run: hf auth login)"
        )
    if status in (401, 403):
        return PermissionError(
            f"{endpoint} refuses {name} with status {status}: check the token in HF_TOKEN (or run: "
            "hf auth login)"
        )
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(f"{missing}. Nothing is downloaded here: HF_HUB_OFFLINE is set")
    return OSError(
        f"{missing}. Downloading it from {endpoint} failed: {type(error).__name__}: {error}. What "
        "has arrived is kept: call again to go on"
    )


def main() -> int:
    """Prints the folder of a checkpoint, for the program ``clusterfusion``, which starts this.

    Standard output has the folder, or with exit code 1 why there is none.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clusterfusion.hub", description="Print the folder of a checkpoint."
    )
    parser.add_argument("name", help="a folder, or a name on the hub (owner/name)")
    parser.add_argument("--revision", help="a branch, a tag or a commit hash; main if not given")
    parser.add_argument("--tokenizer-only", action="store_true", help="do without the weights")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if options.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        print(resolve(options.name, options.revision, tokenizer_only=options.tokenizer_only))
    except (OSError, ValueError) as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
