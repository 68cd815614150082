"""What an engine gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FinishReason: TypeAlias = Literal[
    "stop_token", "stop_string", "token_limit", "context_limit", "cancelled"
]


@dataclass(frozen=True)
class TokenLogprobs:
    """A token with its log-probability.

    Attributes:
        token: The chosen token.
        logprob: Its natural log-probability under the model, before any sampling filter.
        top: The most likely tokens with theirs, most likely first; as many as were asked for.
    """

    token: int
    logprob: float
    top: dict[int, float]

    @classmethod
    def _from_native(cls, sampled: Any) -> "TokenLogprobs":
        token, logprob, ids, logprobs = sampled
        return cls(token, logprob, dict(zip(ids, logprobs, strict=True)))


@dataclass(frozen=True)
class Statistics:
    """Timing of one generation; times are wall-clock seconds.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        prefill_seconds: Spent on passes with pieces of the prompt, which other prompts may share.
        time_to_first_token_seconds: From the start to the first token.
        decode_seconds: Spent in decode steps after the first token.
        seconds_per_token: decode_seconds / (new_tokens - 1); 0 if undefined.
        tokens_per_second: Its inverse; 0 if undefined.
        bytes_per_second: Weights and KV cache read by decode steps, by decode_seconds.
        read_ceiling_bytes_per_second: Of Engine.measure_read_ceiling(); 0 if it has not run.
        ceiling_share: bytes_per_second by the ceiling; 0 if it is not known.
        queue_seconds: Waiting for a place among the engine's sequences and for memory.
        preemptions: How often its memory went to older texts.
        recompute_seconds: Spent on what that had cost.
        prefix_hit_tokens: Tokens of the prompt that were in the prefix cache, or computed for
            another sample.
        decode_steps: Steps in which the model has computed the text's tokens.
        draft_steps: Of these, those in which a draft had proposed some.
        draft_proposed: Tokens that it proposed.
        draft_accepted: Of these, those that were the text's.
        mean_accepted: draft_accepted / draft_steps; 0 if undefined.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    time_to_first_token_seconds: float
    decode_seconds: float
    seconds_per_token: float
    tokens_per_second: float
    bytes_per_second: float
    read_ceiling_bytes_per_second: float
    ceiling_share: float
    queue_seconds: float = 0.0
    preemptions: int = 0
    recompute_seconds: float = 0.0
    prefix_hit_tokens: int = 0
    decode_steps: int = 0
    draft_steps: int = 0
    draft_proposed: int = 0
    draft_accepted: int = 0
    mean_accepted: float = 0.0


@dataclass(frozen=True)
class ServingStatistics:
    """What an engine's scheduler has to do, and what it has done since the engine was opened.

    Attributes:
        sequences_active: Texts that hold memory.
        sequences_waiting: Texts that wait for a place or for memory.
        kv_pages: Pages of 64 positions that the KV cache should have at most.
        kv_pages_in_use: Of these, those of texts and of cached prefixes.
        kv_pages_cached: Of these, those that no text uses.
        prompt_tokens: Of all texts that have begun.
        prefix_hit_tokens: Of these, those that were in the prefix cache, or computed for another
            sample; their share is the hit rate.
        preemptions: How often a text's memory went to older ones.
    """

    sequences_active: int
    sequences_waiting: int
    kv_pages: int
    kv_pages_in_use: int
    kv_pages_cached: int
    prompt_tokens: int
    prefix_hit_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        text: The new text, without the prompt and without a stop string.
        tokens: The new tokens; a stop token is the last of them.
        prompt_tokens: The prompt's tokens.
        finish_reason: Why the text ended; None while it still runs.
        logprobs: One entry for each new token, or None if they were not asked for.
        prompt_logprobs: One entry for each token of the prompt, None for the first, which nothing
            predicts; or None if they were not asked for.
        statistics: Timing.
    """

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None
    statistics: Statistics
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @classmethod
    def _from_native(
        cls, fields: Mapping[str, Any], wants_logprobs: bool, wants_prompt_logprobs: bool = False
    ) -> "Generation":
        prompt_logprobs: list[TokenLogprobs | None] = [None]
        prompt_logprobs += [TokenLogprobs._from_native(one) for one in fields["prompt_scores"]]
        logprobs = [TokenLogprobs._from_native(sampled) for sampled in fields["sampled"]]
        return cls(
            text=str(fields["text"]),
            tokens=np.from_dlpack(fields["tokens"]).tolist(),
            prompt_tokens=np.from_dlpack(fields["prompt_tokens"]).tolist(),
            finish_reason=finish_reason(fields["finish_reason"]),
            logprobs=logprobs if wants_logprobs else None,
            statistics=Statistics(**fields["statistics"]),
            prompt_logprobs=prompt_logprobs if wants_prompt_logprobs else None,
        )


@dataclass(frozen=True)
class Event:
    """One step's news of one text in a stream.

    Attributes:
        index: Which prompt it belongs to; 0 for a single one. With ``n`` samples of each prompt,
            sample s of prompt p has p * n + s.
        text: The text that this step completed; may be empty. All of them together are the text.
        token: The new token, or None in a last event that only brings text or the end.
        logprobs: The token's log-probabilities, or None if they were not asked for.
        finish_reason: Why the text ended, in its last event; else None.
    """

    index: int
    text: str
    token: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None

    @classmethod
    def _from_native(cls, event: Any, wants_logprobs: bool) -> "Event":
        index, text, sampled, reason = event
        return cls(
            index=index,
            text=str(text),
            token=None if sampled is None else sampled[0],
            logprobs=TokenLogprobs._from_native(sampled) if sampled and wants_logprobs else None,
            finish_reason=finish_reason(reason),
        )


def finish_reason(name: str | None) -> FinishReason | None:
    """Returns the library's name of a finish reason as a plain str."""
    reason: Any = None if name is None else str(name)
    return reason  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Score:
    """Log-probability of a text, token by token.

    Attributes:
        tokens: The text's n tokens.
        logprobs: float32 [n - 1]; logprobs[i] is the natural log-probability of tokens[i + 1]
            after tokens[0], ..., tokens[i].
        total: Their sum.
    """

    tokens: list[int]
    logprobs: npt.NDArray[np.float32]
    total: float

    @classmethod
    def _from_native(cls, fields: Mapping[str, Any]) -> "Score":
        return cls(
            tokens=np.from_dlpack(fields["tokens"]).tolist(),
            logprobs=np.array(np.from_dlpack(fields["logprobs"]), dtype=np.float32),
            total=fields["total"],
        )


@dataclass(frozen=True)
class Loglikelihood:
    """Log-probability of a continuation after a context, token by token.

    Attributes:
        tokens: The continuation's n tokens.
        logprobs: float32 [n]; the natural log-probability of each after all tokens before it.
        total: Their sum.
        is_greedy: Whether greedy decoding (with allow_padded_ids) would give this continuation:
            each token is the likeliest at its place.
        top: For each token the likeliest tokens at its place with their log-probabilities, most
            likely first; as many as were asked for.
    """

    tokens: list[int]
    logprobs: npt.NDArray[np.float32]
    total: float
    is_greedy: bool
    top: list[dict[int, float]]

    @classmethod
    def _from_native(cls, fields: Mapping[str, Any]) -> "Loglikelihood":
        tokens = np.from_dlpack(fields["tokens"]).tolist()
        top_tokens, top_logprobs = (
            np.from_dlpack(fields[name]).reshape(len(tokens), -1).tolist()
            for name in ("top_tokens", "top_logprobs")
        )
        return cls(
            tokens=tokens,
            logprobs=np.array(np.from_dlpack(fields["logprobs"]), dtype=np.float32),
            total=fields["total"],
            is_greedy=bool(fields["is_greedy"]),
            top=[
                dict(zip(*likely, strict=True))
                for likely in zip(top_tokens, top_logprobs, strict=True)
            ],
        )


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text by a sliding window.

    Attributes:
        perplexity: exp(mean_nll).
        mean_nll: Mean negative log-likelihood of a scored token, in nats.
        bits_per_byte: Negative log-likelihood in bits by the bytes of the scored tokens' text; 0
            for token input and for method="transformers_docs".
        scored_tokens: Tokens that were predicted.
        total_tokens: Tokens of the text.
        seconds: Wall-clock time.
    """

    perplexity: float
    mean_nll: float
    bits_per_byte: float
    scored_tokens: int
    total_tokens: int
    seconds: float


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a model, from config.json.

    Attributes:
        vocab_size: Rows of the embedding and of the logits.
        hidden_size: Width of the residual stream.
        num_layers: Layers.
        num_heads: Attention heads.
        num_kv_heads: Heads of keys and values: fewer than num_heads where groups share them.
        head_dim: Values of a head: hidden_size / num_heads unless the model says otherwise.
        intermediate_size: Rows of the MLP's first matrix.
        max_positions: The longest context: what the model was made for, but no more than its
            sliding_window.
        rotary_dim: How many values of each head are rotated.
        rope_theta: Base of the rotary frequencies.
        layer_norm_eps: Epsilon of LayerNorm or RMSNorm.
        hidden_act: The activation's name in config.json.
        parallel_residual: Whether attention and MLP both read the layer's input.
        attention_bias: Whether QKV have biases, and (but in Qwen2) the output projection.
        tied_embeddings: Whether the LM head is the input embedding.
        dtype: Of the checkpoint's matrices: "float16", "bfloat16" or "float32".
        bos_token: Token that begins a text, if the model names one.
        eos_tokens: Any of these ends a text.
        model_type: The family, as config.json names it: "gpt_neox", "llama", ...
        rope_type: How rotary frequencies are scaled: "default" (not), "linear", "llama3", "yarn".
        sliding_window: Positions that attention slides over, behind which contexts end; 0: none.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rotary_dim: int
    rope_theta: float
    layer_norm_eps: float
    hidden_act: str
    parallel_residual: bool
    attention_bias: bool
    tied_embeddings: bool
    dtype: str
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    model_type: str
    rope_type: str
    sliding_window: int


@dataclass(frozen=True)
class EngineInfo:
    """What an engine runs, and on what.

    Attributes:
        path: The checkpoint's folder.
        device: "cpu" or "cuda".
        device_description: Processor or GPU, threads, instruction set.
        device_reason: Why device="auto" chose it.
        kv_dtype: Type of the KV cache.
        kv_bytes_per_position: Its bytes for one position of one sequence.
        max_positions: The longest context of this engine.
        kv_bytes: Memory that keys and values should take at most.
        num_parameters: The model's parameters; a tied LM head counts once.
        total_bytes: Bytes of all weights as stored.
        bytes_per_token: Bytes of weights that one decode step reads.
        has_tokenizer: Whether the folder has a tokenizer.json.
        draft: "ngram" or the draft's folder; "" for none.
    """

    path: str
    device: str
    device_description: str
    device_reason: str
    kv_dtype: str
    kv_bytes_per_position: int
    max_positions: int
    kv_bytes: int
    num_parameters: int
    total_bytes: int
    bytes_per_token: int
    has_tokenizer: bool
    draft: str = ""
