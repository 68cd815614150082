"""`model.generate(...)` of transformers, decoded by an engine where that gives the same."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from clusterfusion.engine import Engine

# Of transformers, whose weights an engine can be made of.
MODEL_CLASSES = (
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

# What GenerationConfig's fields must be where they are set at all. The others:
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
}
_KNOWN = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "eos_token_id",
    "pad_token_id",
)
# They do not change the token ids that come out.
_WITHOUT_EFFECT = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "early_stopping",
    "length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "bos_token_id",
    "decoder_start_token_id",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
    "transformers_version",
)
_DEFAULT_NEW_TOKENS = 20


class _NotOursError(Exception):
    """What is asked for, which transformers is to do."""


class _Request(NamedTuple):
    input_ids: Any  # [batch, tokens]
    prompts: list[list[int]]  # without padding
    options: dict[str, Any]  # of Engine.generate
    pad_token: int


class PatchedGenerate:
    """The `generate` of one model, in the place of its class's."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        """clusterfusion.patch() makes these."""
        self._model = model
        self._options = options
        self._engine: Engine | None = None
        self._state: list[tuple[Any, ...]] = []  # of the tensors that the engine was made of
        self._reasons: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_state": []}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the class's `generate` does, by the engine where it can."""
        original = type(self._model).generate
        try:
            given = inspect.signature(original).bind(self._model, *args, **kwargs).arguments
            given.pop("self")
            limit = self._options.get("context") or self._model.config.max_position_embeddings
            request = _read(self._model, {**given.pop("kwargs", {}), **given}, limit)
            engine = self._current_engine()
        except (_NotOursError, NotImplementedError) as reason:
            self._warn(str(reason))
            return original(self._model, *args, **kwargs)
        results = engine.generate(request.prompts, **request.options)
        return _joined(request, [result.tokens for result in results])

    def _warn(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"transformers generates this text: {reason}", UserWarning, stacklevel=3)

    def _current_engine(self) -> Engine:
        from clusterfusion.transformers_models import from_transformers

        state = [_identity(name, t) for name, t in self._model.state_dict(keep_vars=True).items()]
        if self._engine is None or state != self._state:
            self._engine = None  # frees its memory first
            self._engine = from_transformers(self._model, **self._options)
            self._state = state
        return self._engine


def _identity(name: str, tensor: Any) -> tuple[Any, ...]:
    """What changes when a tensor is replaced, or written to in place."""
    version = 0 if tensor.is_inference() else tensor._version
    return name, tensor.data_ptr(), version, tensor.dtype, tensor.device


class _Settings:
    """What the call, its generation_config and the model's say, the first that speaks."""

    def __init__(self, model: Any, call: Mapping[str, Any]) -> None:
        self._call = call
        given = call.get("generation_config")
        self._configs = [vars(config) for config in (given, model.generation_config) if config]
        self._defaults = vars(type(model.generation_config)())

    def __getitem__(self, name: str) -> Any:
        if name in self._call:
            return self._call[name]
        values = (config.get(name) for config in self._configs)
        return next((value for value in values if value is not None), None)

    def names(self) -> Iterator[str]:
        return (name for config in (self._defaults, *self._configs) for name in config)

    def require_known(self) -> None:
        """Raises _NotOursError for a setting that changes the text in a way of its own."""
        for name in dict.fromkeys((*self.names(), *self._call)):
            if name in (*_KNOWN, *_WITHOUT_EFFECT, *_ARGUMENTS) or name.startswith("_"):
                continue
            value = self[name]
            if value is None or value is False or value == _NEUTRAL.get(name):
                continue
            raise _NotOursError(f"{name} is not known to clusterfusion's engine")

    def is_default_length(self) -> bool:
        """Whether max_length is nobody's: transformers below 5 have 20 in each configuration."""
        value = self["max_length"]
        own = self._call.get("max_length") is None
        return value is None or (own and value == self._defaults["max_length"])


_ARGUMENTS = ("inputs", "input_ids", "attention_mask", "generation_config")


def _read(model: Any, call: Mapping[str, Any], limit: int) -> _Request:
    """The engine's request for a call. Raises _NotOursError where that would be another one."""
    _require_plain(model)
    settings = _Settings(model, call)
    settings.require_known()
    input_ids = call.get("inputs") if call.get("input_ids") is None else call["input_ids"]
    _require_ids(input_ids)
    eos = _ids(settings["eos_token_id"])
    pad = settings["pad_token_id"]
    mask = _mask(call.get("attention_mask"), input_ids, pad, eos)
    prompts = [
        [token for token, kept in zip(*row, strict=True) if kept]
        for row in zip(input_ids.tolist(), mask, strict=True)
    ]
    options = _lengths(settings, input_ids.shape[1], limit)
    options |= _sampling(settings, len(prompts))
    padded = any(len(prompt) < input_ids.shape[1] for prompt in prompts)
    if padded and (options["repetition_penalty"] != 1 or options["no_repeat_ngram_size"]):
        raise _NotOursError("it counts the padding among the tokens that are penalised")
    options |= {"ignore_eos": True, "stop_tokens": eos, "allow_padded_ids": True}
    return _Request(input_ids, prompts, options, pad if pad is not None else (eos or [0])[0])


def _require_plain(model: Any) -> None:
    """The engine computes the model's class as it is in evaluation, and nothing else."""
    if type(model).__name__ not in MODEL_CLASSES:
        raise _NotOursError(f"the model is a {type(model).__name__}")
    if model.training:
        raise _NotOursError("the model is in training mode (model.eval() ends it)")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _NotOursError(f"there are hooks on {name or 'the model'}")


def _require_ids(input_ids: Any) -> None:
    if input_ids is None or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise _NotOursError("input_ids is no matrix of token ids")
    if 0 in input_ids.shape:
        raise _NotOursError("input_ids is empty")


def _ids(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    return [int(token) for token in tokens] if isinstance(tokens, list | tuple) else [int(tokens)]


def _mask(mask: Any, input_ids: Any, pad: int | None, eos: list[int]) -> list[list[int]]:
    """Which tokens of each row count: all behind some padding."""
    if mask is None:
        if pad is None or pad in eos:
            return [[1] * input_ids.shape[1]] * input_ids.shape[0]
        mask = input_ids.ne(pad).long()  # as transformers infers it
    if mask.shape != input_ids.shape:
        raise _NotOursError("attention_mask has another shape than input_ids")
    rows: list[list[int]] = (mask != 0).long().tolist()
    for row in rows:
        if row != sorted(row) or not row[-1]:
            raise _NotOursError("attention_mask leaves out more than padding on the left")
    return rows


def _lengths(settings: _Settings, given: int, limit: int) -> dict[str, Any]:
    """How many tokens follow the `given` ones, padding among them."""
    new_tokens = settings["max_new_tokens"]
    if new_tokens is None and settings.is_default_length():
        new_tokens = min(_DEFAULT_NEW_TOKENS, limit - given)
    elif new_tokens is None:
        new_tokens = settings["max_length"] - given
    least = settings["min_new_tokens"]
    if least is None:
        least = max((settings["min_length"] or 0) - given, 0)
    if new_tokens < 1:
        raise _NotOursError("there is no room for a new token")
    if given + new_tokens > limit:
        raise _NotOursError(f"the text may grow beyond {limit} positions")
    if least > new_tokens:
        raise _NotOursError("the least number of new tokens is above the most")
    return {"max_new_tokens": new_tokens, "min_new_tokens": least}


def _sampling(settings: _Settings, count: int) -> dict[str, Any]:
    def number(name: str, default: float) -> Any:
        value = settings[name]
        return default if value is None else value

    options = {
        "repetition_penalty": number("repetition_penalty", 1.0),
        "no_repeat_ngram_size": number("no_repeat_ngram_size", 0),
    }
    if not settings["do_sample"]:
        return options
    import torch

    filters = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    options |= {name: number(name, default) for name, default in filters.items()}
    if not options["temperature"] > 0:
        raise _NotOursError("temperature is not above 0")
    return options | {"seed": torch.randint(2**63 - 1, (count,)).tolist()}


def _joined(request: _Request, new: list[Any]) -> Any:
    """The prompts as they were given, the new tokens, and padding: [batch, tokens]."""
    width = max(len(tokens) for tokens in new)
    rows = [[*map(int, tokens)] + [request.pad_token] * (width - len(tokens)) for tokens in new]
    like = request.input_ids
    return like.new_tensor([[*ids, *row] for ids, row in zip(like.tolist(), rows, strict=True)])
