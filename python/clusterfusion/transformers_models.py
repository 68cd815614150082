"""Models of transformers that are loaded already: an engine of their weights, and `generate` by it.

>>> model = transformers.AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-160m")
>>> engine = clusterfusion.from_transformers(model, tokenizer="EleutherAI/pythia-160m")
>>> clusterfusion.patch(model)  # model.generate(...) decodes by an engine from here on
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from clusterfusion import _native
from clusterfusion._generate import MODEL_CLASSES, PatchedGenerate
from clusterfusion.engine import Engine, _open_arguments, _reporter
from clusterfusion.tokenizer import Tokenizer

Model: TypeAlias = Any  # one of MODEL_CLASSES


def from_transformers(
    model: Model,
    tokenizer: Any = None,
    *,
    device: str | None = None,
    threads: int = 0,
    context: int | None = None,
    kv_dtype: str | None = None,
    mode: str = "latency",
    max_sequences: int = 256,
    kv_bytes: int = 0,
    prefix_cache: bool = True,
    draft: str | os.PathLike[str] | None = None,
    draft_tokens: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Engine:
    """Makes an engine of a model that transformers has loaded.

    On the CPU matrices are used where they are, not copied, and kept alive by the engine. A GPU's
    kernels need all layers in one block, one after the other, so there they are copied (those of a
    model on a GPU by way of host memory, which keeps a copy too).

    The engine is of the weights as they are now. Change them afterwards (train, load others, move
    the model), and make another engine: this one sees all of the change, a part of it, or nothing.
    It knows nothing of hooks on the model's modules either.

    Args:
        model: A `GPTNeoXForCausalLM`, `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`
            or `Qwen3ForCausalLM` of transformers, in float16, bfloat16 or (on the CPU) float32.
        tokenizer: A fast tokenizer of transformers, a `tokenizers.Tokenizer`, a :class:`Tokenizer`,
            or what `Tokenizer(path)` takes: a folder or a name on the hub. None for an engine that
            takes and gives token ids only.
        device: "auto", "cpu" or "cuda"; None for the one that the model is on.
        threads: As those of :class:`Engine`, like all that follow.
        context: The longest context in tokens.
        kv_dtype: Type of the KV cache.
        mode: "latency" or "throughput".
        max_sequences: Texts that are computed together at most.
        kv_bytes: Memory that keys and values should take at most.
        prefix_cache: Whether prompts that begin alike share keys and values.
        draft: Who proposes tokens: "ngram", a checkpoint, or None.
        draft_tokens: Tokens that it may propose at a time.
        progress: Called while weights are copied to a GPU.

    Raises:
        TypeError: The model or the tokenizer is of another kind.
        ValueError: Tensors do not fit the configuration, or an argument is wrong.
        NotImplementedError: The model is not one this library runs: a dtype, an activation, weights
            that are not in memory.
    """
    require_model(model)
    arguments = _open_arguments(
        _device_of(model) if device is None else device,
        *(threads, context, kv_dtype, mode, max_sequences, kv_bytes, prefix_cache),
        *(draft, draft_tokens),
    )
    return _open_engine(model, arguments, _reporter(progress), open_tokenizer(tokenizer))


def _device_of(model: Model) -> str:
    return "cuda" if {p.device.type for p in model.parameters()} == {"cuda"} else "cpu"


def _open_engine(
    model: Model, arguments: tuple[Any, ...], report: Any, tokenizer: Tokenizer | None
) -> Engine:
    names, tensors = _weights(model)
    handle = None if tokenizer is None else tokenizer._handle
    engine = Engine.__new__(Engine)
    engine._open_handle = None
    engine._open(
        lambda: _native.engine_from_tensors(
            _texts(model), names, tensors, handle, *arguments, report
        ),
        report,
        stacklevel=4,  # where from_transformers() was called
    )
    return engine


def patch(model: Model, **options: Any) -> None:
    """Makes `model.generate(...)` decode by an engine, made at the first call.

    Greedy texts are those of transformers in float32; in other dtypes they may differ where two
    tokens are as likely but for rounding. Sampled ones have transformers' distribution, and follow
    `torch.manual_seed`, but are other texts. What the engine does not know (beams, streamers,
    processors of logits, outputs other than token ids, hooks on modules, ...) transformers does
    itself, with one warning for each reason.

    The engine is made again where the model's tensors were replaced or changed in place since, but
    not where they were changed behind PyTorch's back (`parameter.data`, NumPy views).

    Args:
        model: What :func:`from_transformers` takes.
        **options: Those of :func:`from_transformers`, without the tokenizer.

    Raises:
        TypeError: The model is of another kind, or there is no such option.
        ValueError: It is patched already.
    """
    require_model(model)
    if isinstance(model.__dict__.get("generate"), PatchedGenerate):
        raise ValueError("model: expected one that is not patched, found one that is")
    known = set(from_transformers.__kwdefaults__ or {})
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option '{name}': expected one of {sorted(known)}")
    model.generate = PatchedGenerate(model, options)


def unpatch(model: Model) -> None:
    """Undoes :func:`patch`, and frees the engine.

    Raises:
        ValueError: The model is not patched.
    """
    if not isinstance(getattr(model, "__dict__", {}).get("generate"), PatchedGenerate):
        raise ValueError("model: expected one that clusterfusion.patch() patched, found another")
    del model.generate


def require_model(model: object) -> None:
    """Raises TypeError unless the model is of one of transformers' classes that we know."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if names.isdisjoint(MODEL_CLASSES) or not hasattr(model, "state_dict"):
        known = ", ".join(MODEL_CLASSES[:-1])
        raise TypeError(
            f"model: expected a transformers.{known} or {MODEL_CLASSES[-1]}, found "
            f"{type(model).__name__}"
        )


def open_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer of ours, from whatever from_transformers() takes for one."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        return Tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if getattr(tokenizer, "is_fast", False):
            tokenizer.save_pretrained(folder)
        elif type(tokenizer).__module__.partition(".")[0] == "tokenizers":
            tokenizer.save(str(Path(folder) / "tokenizer.json"))
        else:
            raise TypeError(
                "tokenizer: expected a fast tokenizer of transformers, a tokenizers.Tokenizer, a "
                f"clusterfusion.Tokenizer or a path, found {type(tokenizer).__name__}"
            )
        return Tokenizer(folder)


def _texts(model: Model) -> tuple[str, str, str]:
    """A name for messages, and what config.json and generation_config.json would say."""
    name = f"the {type(model).__name__} {model.config.name_or_path or 'in memory'}"
    generation = getattr(model, "generation_config", None)
    return name, model.config.to_json_string(), generation.to_json_string() if generation else ""


def _weights(model: Model) -> tuple[list[str], list[Any]]:
    """Names and tensors, in host memory and contiguous; without a copy where they are so."""
    names, tensors = [], []
    for name, tensor in model.state_dict().items():
        if tensor.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"model: expected weights in the memory of the CPU or a GPU, found {name} on "
                f"'{tensor.device}'; load the model without offloading"
            )
        names.append(name)
        tensors.append(tensor.detach().cpu().contiguous())
    return names, tensors
