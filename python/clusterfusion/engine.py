"""Text in, tokens out."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar, overload

import numpy as np
import numpy.typing as npt

from clusterfusion import _interventions, _native, hub
from clusterfusion._arguments import (
    INT32_MAX,
    INT32_MIN,
    DLPackArray,
    Prompt,
    Text,
    Tokens,
    boolean,
    callback,
    file_path,
    in_callers_words,
    integer,
    is_batch,
    is_text,
    not_picklable,
    number,
    prompt_tokens,
    text_option,
    token_ids,
    utf8,
)
from clusterfusion.results import (
    EngineInfo,
    Event,
    Generation,
    Loglikelihood,
    ModelConfig,
    Perplexity,
    Score,
    ServingStatistics,
)
from clusterfusion.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

PromptT = TypeVar("PromptT", bound=Prompt)
ArrayT = TypeVar("ArrayT", bound=DLPackArray)


class GenerateOptions(TypedDict, total=False):
    """Keyword options of :meth:`Engine.generate` and :meth:`Engine.stream`.

    The scores are adjusted in this order: logit_bias, repetition, frequency and presence penalty,
    what is forbidden. Then the filters apply in that of transformers' ``generate()``: temperature,
    top-k, top-p, min-p.

    Attributes:
        max_new_tokens: The most tokens to generate; 128 if not given.
        temperature: >= 0; 0 (if not given) always takes the likeliest token.
        top_k: >= 0; keep the k likeliest tokens; 0 (if not given) keeps all.
        top_p: In (0, 1]; keep the fewest likeliest tokens whose probabilities reach it; 1 if not
            given.
        min_p: In [0, 1]; drop tokens less likely than min_p times the likeliest; 0 if not given.
        repetition_penalty: > 0; scores of tokens seen so far are divided (if above 0) or
            multiplied (if below) by it; 1 if not given.
        frequency_penalty: In [-2, 2], as the OpenAI API defines it: subtracted from a token's score
            for each time that it stands in the new text; 0 if not given.
        presence_penalty: In [-2, 2], as the OpenAI API defines it: subtracted once if the token
            stands there at all; 0 if not given.
        no_repeat_ngram_size: >= 0; no so many tokens in a row stand twice in prompt and text, as in
            transformers; 0 (if not given) lets all repeat.
        logit_bias: Numbers in [-100, 100] that are added to the scores of token ids; none if not
            given.
        min_new_tokens: Until there are so many new tokens, none that ends the text (end-of-text or
            ``stop_tokens``) is drawn, as in transformers; ``stop`` still ends it. 0 if not given.
        allow_padded_ids: Whether ids behind the tokenizer's vocabulary may be drawn (a model's
            vocabulary is often padded); False if not given.
        seed: In [0, 2**64); 0 if not given. The same seed gives the same text on any device, with
            any number of threads, alone or in a batch. For several prompts also a list of one
            seed each.
        stop: A text or several; the generated text ends before the first of them.
        stop_tokens: Token ids that end a text, besides the model's own.
        ignore_eos: Whether to go on after the model's end-of-text tokens; False if not given.
        logprobs: None (if not given) for no log-probabilities; 0 for those of the chosen tokens;
            n in 1 ... 100 also for the n likeliest at each step.
        prompt_logprobs: The same for the tokens of the prompt, all but the first. With
            max_new_tokens=0 the prompt is scored and nothing is generated.
        add_special_tokens: Whether the tokenizer's post-processor adds its tokens to a text prompt;
            True if not given.
        skip_special_tokens: Whether special tokens are left out of the text; True if not given.
        generation_config: Whether the checkpoint's generation_config.json says what is not given
            here, as transformers' ``generate()`` understands it: max_new_tokens, temperature,
            top_k, top_p, min_p, repetition_penalty (greedy without its do_sample; with it
            temperature 1 and top_k 50 where it is silent). False if not given: then only its
            end-of-text tokens count.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    no_repeat_ngram_size: int
    logit_bias: Mapping[int, float] | None
    min_new_tokens: int
    allow_padded_ids: bool
    seed: int | Sequence[int]
    stop: Text | Sequence[Text] | None
    stop_tokens: Tokens | None
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    add_special_tokens: bool
    skip_special_tokens: bool
    generation_config: bool


_DEFAULTS: GenerateOptions = {
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": None,
    "min_new_tokens": 0,
    "allow_padded_ids": False,
    "seed": 0,
    "stop": None,
    "stop_tokens": None,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "add_special_tokens": True,
    "skip_special_tokens": True,
    "generation_config": False,
}


class Stream(Iterator[Event]):
    """Running generation of one or more texts: an iterator of events.

    It is computed ahead of the iteration, together with what other threads generate. Ending it
    early frees what it holds: leave a ``with`` block, call :meth:`close`, or drop the stream.
    :meth:`cancel` may be called from another thread.
    """

    def __init__(self, handle: Any, wants_logprobs: bool, wants_prompt_logprobs: bool) -> None:
        """Engine.stream() makes these."""
        self._handle = handle
        self._wants_logprobs = wants_logprobs
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        try:
            event = _native.generation_next(self._handle)
            if event is not None:
                return Event._from_native(event, self._wants_logprobs)
        except BaseException:
            self.close()  # also for a KeyboardInterrupt that came up on the way back
            raise
        self._ended = True
        raise StopIteration

    def cancel(self) -> None:
        """Ends all texts behind what has come out; the iteration sees their ends."""
        _native.generation_cancel(self._handle)

    def close(self) -> None:
        """Cancels what still runs. The results so far remain."""
        self.cancel()
        self._ended = True
        while _native.generation_next(self._handle) is not None:
            pass

    @property
    def results(self) -> list[Generation]:
        """The texts so far, one for each prompt; final when the iteration has ended."""
        return [
            Generation._from_native(result, self._wants_logprobs, self._wants_prompt_logprobs)
            for result in _native.generation_results(self._handle)
        ]

    def __reduce__(self) -> NoReturn:
        raise not_picklable(self, "Engine(path).stream(...)")

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Engine:
    """A model, its tokenizer and a device behind one door.

    It may be used in a ``with`` block, which closes it. All methods may be called from several
    threads: what they generate shares steps, and other calls take turns with these. They
    release the GIL while they compute. Exceptions are Python's own: ValueError and TypeError for
    arguments, IndexError for token ids outside the vocabulary, MemoryError if the KV cache does not
    fit, ArithmeticError if the model computes NaN or infinity.
    """

    # What holds for requests that begin now.
    _steering = _interventions.NO_STEERING
    _ablation = _interventions.NO_ABLATION

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        *,
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
        revision: str | None = None,
    ) -> None:
        """Opens a Hugging Face checkpoint of a GPT-NeoX, Llama, Mistral, Qwen2 or Qwen3 model.

        The weights are memory-mapped: used in place on the CPU, copied to a GPU.

        Args:
            path: Folder with config.json, model.safetensors or pytorch_model.bin (of PyTorch 1.6 or
                newer; or the shards of either with their index) and tokenizer.json. Without a
                tokenizer the engine takes and gives token ids only. Or a model's name on the hub
                (owner/name), which is downloaded if it is not in the cache: :func:`hub.resolve`.
            device: "auto", "cpu" or "cuda".
            threads: CPU worker threads; 0 for one on each usable core.
            context: The longest context in tokens; None or 0 for the model's own.
            kv_dtype: Type of the KV cache, "float32", "float16" or "bfloat16"; None for float32 on
                the CPU and the weights' type on a GPU, which has float32 beside it, more slowly.
            mode: What a GPU is to be quick at: "latency" of one sequence, or "throughput" of many,
                of which up to 256 are decoded in a step. In each mode a text depends on its
                request alone; the modes differ in last bits. On the CPU they are the same.
            max_sequences: Texts that are computed together at most; others wait.
            kv_bytes: Memory that keys and values of texts and of cached prefixes should take at
                most. Where it runs out the youngest text waits, and is computed again later with
                the same outcome. 0 for half of the memory that is left on the CPU, nine tenths on
                a GPU.
            prefix_cache: Whether prompts that begin with the same tokens share their keys and
                values. Texts are the same with and without.
            draft: Who proposes tokens that may come next, several of which are then computed in one
                step, for the same texts in less time: "ngram" (what followed the last tokens where
                they stood in the text before), or a smaller checkpoint with the same tokens, a
                folder or a name on the hub, which runs on the same device; None for nobody. On a
                GPU it needs mode="throughput".
            draft_tokens: Tokens that it may propose for a text in one step, 1 to 15; it proposes
                fewer, or none, where they would not pay.
            progress: Called while the weights are copied to a GPU, with bytes done and in all:
                first with 0, last with all. On the CPU it is called once, with all. What it raises
                ends the loading and is raised here.
            revision: Of a name on the hub: a branch, a tag or a whole commit hash; None for "main".

        Raises:
            FileNotFoundError: The folder or one of its files does not exist, here and on the hub.
            PermissionError: A file may not be read.
            OSError: Reading or downloading failed.
            ValueError: A file is broken, the tokenizer does not fit the model, or an argument is
                wrong.
            NotImplementedError: The checkpoint is well-formed, but not one this library runs.
            MemoryError: Memory does not suffice.

        Warns (UserWarning) of what a user should know of the checkpoint though it runs.
        """
        self._open_handle = None
        report = _reporter(progress)
        arguments = _open_arguments(
            device,
            threads,
            context,
            kv_dtype,
            mode,
            max_sequences,
            kv_bytes,
            prefix_cache,
            draft,
            draft_tokens,
        )
        folder = hub.resolve(path, revision)
        self._open(lambda: _native.engine_open(folder, *arguments, report), report, stacklevel=3)

    def _open(self, make: Callable[[], Any], report: _Reporter | None, stacklevel: int) -> None:
        """Takes the handle that `make` returns, and warns of what the library says of it."""
        try:
            with in_callers_words():
                self._open_handle = make()
        except Exception:
            if report is not None and report.raised is not None:
                raise report.raised from None
            raise
        for message in _native.engine_warnings(self._handle):
            warnings.warn(str(message), UserWarning, stacklevel=stacklevel)

    @property
    def _handle(self) -> Any:
        if self._open_handle is None:
            raise ValueError("this Engine is closed; open another one: Engine(path)")
        return self._open_handle

    def close(self) -> None:
        """Frees the model and the device's memory once the streams and tokenizers of it are gone.

        Afterwards every other method raises ValueError. Leaving a ``with`` block does the same, and
        so does dropping the engine.
        """
        self.__dict__.pop("tokenizer", None)
        self._open_handle = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise not_picklable(self, "Engine(path)")

    @cached_property
    def config(self) -> ModelConfig:
        """The model's hyper-parameters."""
        fields = _native.engine_config(self._handle)
        eos_tokens = tuple(fields.pop("eos_tokens"))
        return ModelConfig(**fields, eos_tokens=eos_tokens)

    @cached_property
    def info(self) -> EngineInfo:
        """What the engine runs, and on what."""
        return EngineInfo(**_native.engine_info(self._handle))

    def serving_statistics(self) -> ServingStatistics:
        """Returns what the scheduler has to do now, and what it has done so far."""
        return ServingStatistics(**_native.engine_serving_statistics(self._handle))

    def save_prompt_cache(self, prompt: Prompt, path: str | os.PathLike[str]) -> int:
        """Saves keys and values of a prompt's beginning to a file: a long prompt is read once.

        Whole pages of 64 tokens are saved. The prompt is read as :meth:`generate` reads it, unless
        the prefix cache has it already. The file appears whole or not at all, in the place of one
        that was there.

        Args:
            prompt: A text or token ids.
            path: The file.

        Returns:
            For how many of the prompt's tokens the file stands.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The prompt is too short to save; the engine has no prefix cache; texts are
                steered or ablated now.
            IndexError: A token id is not in the vocabulary.
            MemoryError: Other texts needed the memory before the prompt was saved.
            OSError: The file cannot be written.
        """
        tokens = self._token_ids(prompt)
        file = file_path("path", path)
        return int(_native.engine_save_prompt_cache(self._handle, tokens, file))

    def load_prompt_cache(self, path: str | os.PathLike[str], prompt: Prompt | None = None) -> int:
        """Takes what :meth:`save_prompt_cache` has saved into the prefix cache.

        Texts that begin with its tokens find it there until others need the memory. They are what
        they would be without it, bit for bit.

        Args:
            path: The file.
            prompt: A text or token ids that have to begin with the file's tokens; None for not
                comparing.

        Returns:
            The number of tokens that the file stands for.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The file was saved of another model (shape or weights), kv_dtype, device,
                mode or version, or of another prompt; it is damaged, or no such file.
            FileNotFoundError: There is no file.
            OSError: The file cannot be read.
            MemoryError: There is no room for its pages.
        """
        tokens = np.empty(0, np.int32) if prompt is None else self._token_ids(prompt)
        file = file_path("path", path)
        return int(_native.engine_load_prompt_cache(self._handle, file, tokens))

    @property
    def device(self) -> str:
        """The device in use, "cpu" or "cuda"."""
        return self.info.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            FileNotFoundError: The folder has none.
        """
        return Tokenizer._from_handle(_native.engine_tokenizer(self._handle))

    def encode(self, text: Text, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes a text to token ids: :meth:`Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Tokens, *, skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text: :meth:`Tokenizer.decode`.

        Raises:
            IndexError: An id is neither the model's nor the tokenizer's.
        """
        ids = token_ids("tokens", tokens)
        size = max(self.config.vocab_size, self.tokenizer.vocab_size)
        outside = np.flatnonzero((ids < 0) | (ids >= size))
        if outside.size:
            index = int(outside[0])
            raise IndexError(f"tokens[{index}] is {ids[index]}, expected a token id in [0, {size})")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @overload
    def generate(
        self, prompt: Prompt, *, n: None = None, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompt, *, n: int, **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompt: list[PromptT] | tuple[PromptT, ...],
        *,
        n: None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompt: list[PromptT] | tuple[PromptT, ...],
        *,
        n: int,
        **options: Unpack[GenerateOptions],
    ) -> list[list[Generation]]: ...

    def generate(self, prompt: Any, *, n: int | None = None, **options: Any) -> Any:
        """Generates the continuation of a prompt, or of several as one batch.

        Args:
            prompt: A text (str, or bytes of UTF-8), or token ids (a list of integers or a 1-D
                DLPack array of integers on the CPU), or a list of such prompts, which may be empty.
            n: Samples of each prompt, in [1, 65536], which share the work on it. Sample i is the
                text of ``seed + i``, as in vLLM; without a temperature all are the same.
            **options: Those of :class:`GenerateOptions`.

        Returns:
            A Generation; for a list of prompts a list, in the same order. Each is what its prompt
            alone would give. With ``n`` a list of n in the place of each.

        Raises:
            TypeError: A prompt or an option has the wrong type, or an option is not known.
            ValueError: A prompt is empty or too long, or an option is outside its range.
            FileNotFoundError: Text where the checkpoint has no tokenizer.
            IndexError: A token id is not in the vocabulary.
            KeyboardInterrupt: On Ctrl-C, within a moment.
        """
        with self.stream(prompt, n=n, **options) as stream:
            for _ in stream:
                pass
        results: list[Any] = stream.results
        if n is not None:
            results = [results[i : i + n] for i in range(0, len(results), n)]
        return results if is_batch(prompt) else results[0]

    def stream(
        self,
        prompt: Prompt | list[PromptT] | tuple[PromptT, ...],
        *,
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Like :meth:`generate`, but gives each token as it comes.

        Everything is checked before this returns.

        Args:
            prompt: As in :meth:`generate`.
            n: As in :meth:`generate`.
            **options: Those of :class:`GenerateOptions`.

        Returns:
            An iterator of :class:`Event`; its ``results`` are what :meth:`generate` would return,
            in a flat list.
        """
        if is_batch(prompt):
            prompts = [_prompt_fields(f"prompt[{i}]", one) for i, one in enumerate(prompt)]
        else:
            prompts = [_prompt_fields("prompt", prompt)]
        requests = _requests(prompts, options, self._own_defaults)
        samples = 1 if n is None else integer("n", n, 1, 65536)
        requests = [{**request, "n": samples} for request in requests]
        with in_callers_words():
            handle = _native.engine_start(self._handle, requests)
        return Stream(
            handle,
            wants_logprobs=options.get("logprobs") is not None,
            wants_prompt_logprobs=options.get("prompt_logprobs") is not None,
        )

    def _own_defaults(self) -> GenerateOptions:
        """What the checkpoint's generation_config.json says."""
        fields: Any = _native.engine_generation_config(self._handle)
        return fields  # type: ignore[no-any-return]

    @overload
    def logits(self, prompt: Prompt, *, out: None = None) -> npt.NDArray[np.float32]: ...
    @overload
    def logits(self, prompt: Prompt, *, out: ArrayT) -> ArrayT: ...

    def logits(
        self, prompt: Prompt, *, out: DLPackArray | None = None
    ) -> npt.NDArray[np.float32] | DLPackArray:
        """Computes the logits at every position.

        Args:
            prompt: n token ids, or a text that becomes them.
            out: Where to write them: a contiguous, writable float32 array [n, vocab_size] on the
                CPU, of NumPy, torch or any other library that speaks DLPack.

        Returns:
            float32 [n, vocab_size]; row i is computed from tokens 0 ... i. A NumPy array, or
            ``out`` if that is given.

        Raises:
            TypeError: ``out`` has another dtype or lies on another device.
            ValueError: ``out`` has another shape or cannot be written; or there are no tokens, or
                too many.
            IndexError: A token id is not in the vocabulary.
        """
        tokens = self._token_ids(prompt)
        if out is None:
            out = np.empty((tokens.size, self.config.vocab_size), dtype=np.float32)
        _native.engine_logits(self._handle, tokens, _writable("out", out))
        return out

    @overload
    def score(self, prompt: Prompt) -> Score: ...
    @overload
    def score(self, prompt: list[PromptT] | tuple[PromptT, ...]) -> list[Score]: ...

    def score(self, prompt: Any) -> Score | list[Score]:
        """Computes the log-probability of a text, or of each of several, token by token.

        Args:
            prompt: A text, or its token ids, or a list of such prompts. Each has at least two
                tokens, and at most one more than the context has positions: the last is not fed.

        Returns:
            A Score; for a list of prompts a list, in the same order.

        Raises:
            TypeError: A prompt has the wrong type.
            ValueError: A prompt has too few or too many tokens.
            IndexError: A token id is not in the vocabulary.
        """
        if not is_batch(prompt):
            return Score._from_native(_native.engine_score(self._handle, self._token_ids(prompt)))
        texts = [self._token_ids(one, f"prompt[{i}]") for i, one in enumerate(prompt)]
        with in_callers_words("texts"):
            scores = _native.engine_score_all(self._handle, texts)
        return [Score._from_native(score) for score in scores]

    def loglikelihood(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        top: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Loglikelihood]:
        """Computes how likely continuations are after contexts, token by token.

        A pair of texts becomes tokens as in lm-evaluation-harness: white space at the end of the
        context goes to the continuation; the two are encoded as one text, and what comes after as
        many tokens as the context alone has is the continuation. An empty context stands for the
        model's bos_token, or else its first end-of-text token.

        Args:
            contexts: Texts, or lists of token ids.
            continuations: As many; a text for each text, token ids for token ids.
            top: In 0 ... 100; how many of the likeliest tokens to give for each place.
            progress: Called after each pair, with pairs done and in all. What it raises ends the
                work and is raised here.

        Returns:
            One entry for each pair, in the same order.

        Raises:
            TypeError: An argument has the wrong type, or one of a pair is text and the other is
                not.
            ValueError: There are not as many contexts as continuations; or a pair has no token to
                score, or more than one beyond the context's positions.
            IndexError: A token id is not in the vocabulary.
            KeyboardInterrupt: On Ctrl-C, within a moment.
        """
        heads, tails = _batch("contexts", contexts), _batch("continuations", continuations)
        if len(heads) != len(tails):
            raise ValueError(
                f"continuations: expected one for each of {len(heads)} contexts, found {len(tails)}"
            )
        pairs = [self._pair(i, *pair) for i, pair in enumerate(zip(heads, tails, strict=True))]
        report = None if progress is None else _Reporter(callback("progress", progress))
        try:
            with in_callers_words("pairs"):
                results = _native.engine_loglikelihood(
                    self._handle,
                    [context for context, _ in pairs],
                    [continuation for _, continuation in pairs],
                    integer("top", top, 0, 100),
                    report,
                )
        except Exception:
            if report is not None and report.raised is not None:
                raise report.raised from None
            raise
        return [Loglikelihood._from_native(result) for result in results]

    def perplexity(
        self,
        prompt: Prompt,
        *,
        context: int | None = None,
        stride: int | None = None,
        method: str = "each_token",
    ) -> Perplexity:
        """Computes the perplexity of a text of any length with a sliding window.

        Each token but the text's first is scored once, in the first window that holds it.

        Args:
            prompt: A text, or its token ids.
            context: The window's length in tokens, at least 2; None or 0 for the longest possible.
            stride: Tokens that the window moves on, in [1, context]; None or 0 for half of it.
            method: "each_token" counts each scored token once. "transformers_docs" is the loop of
                https://huggingface.co/docs/transformers/perplexity, number for number, which
                weighs a window by its new tokens less one; its stride is at least 2.

        Raises:
            ValueError: An option is outside its range, or there are fewer than two tokens.
            KeyboardInterrupt: On Ctrl-C, within a moment.
        """
        options = (
            integer("context", context, 0) if context is not None else 0,
            integer("stride", stride, 0) if stride is not None else 0,
            text_option("method", method),
        )
        if is_text(prompt):
            text = utf8("prompt", prompt)
            return Perplexity(**_native.engine_perplexity_of_text(self._handle, text, *options))
        tokens = prompt_tokens("prompt", prompt)
        return Perplexity(**_native.engine_perplexity(self._handle, tokens, *options))

    def hidden_states(
        self,
        prompt: Prompt,
        layers: Sequence[int] | None = None,
        at: str | Sequence[str] = "hidden_states[*]",
    ) -> dict[str, Any]:
        """Computes activations of a text by their names.

        Names are those of TransformerLens, of transformers' result ``hidden_states`` and of
        transformers' modules, whose output is meant; ``*`` stands for each of ``layers``:

        ==================================  ===================================================
        ``blocks.*.hook_resid_pre``         The residual stream before a layer, steering included.
        ``hidden_states[*]``                The same; entry ``num_layers``, the last, is what comes
                                            out of the final LayerNorm, as in transformers.
        ``blocks.*.hook_attn_out``,         Attention's output, projected, with bias.
        ``gpt_neox.layers.*.attention``
        ``blocks.*.hook_mlp_out``,          The MLP's output.
        ``gpt_neox.layers.*.mlp``
        ``blocks.*.hook_resid_post``,       The residual stream behind a layer.
        ``gpt_neox.layers.*``
        ``ln_final.hook_normalized``,       What the LM head reads.
        ``gpt_neox.final_layer_norm``
        ==================================  ===================================================

        Modules of Llama and its relatives have names of their own: ``model.layers.*``, behind it
        ``.self_attn`` and ``.mlp``, and ``model.norm``.

        ``hook_resid_pre`` alone stands for ``blocks.*.hook_resid_pre``, and so on. The numbers are
        those of TransformerLens' ``from_pretrained_no_processing``.

        Args:
            prompt: n token ids, or a text that becomes them; n at most the context.
            layers: Numbers that ``*`` stands for; None for all.
            at: A name, or several.

        Returns:
            By name, with the layer's number: float32 [n, hidden_size]. NumPy arrays on the CPU; on
            a GPU arrays in its memory that speak DLPack (``torch.from_dlpack(array)``) and own that
            memory. Names of the same activation share it. The values are not checked: where the
            model computes NaN there is NaN.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A name is not known (the message lists those that are), or there are no
                tokens, or too many.
            IndexError: A layer or a token id is out of range.
            MemoryError: Memory does not suffice.
        """
        numbers = None if layers is None else _interventions.integers("layers", layers)
        found = _native.engine_hidden_states(
            self._handle, self._token_ids(prompt), _interventions.names("at", at), numbers
        )
        on_host = self.device == "cpu"
        return {str(name): np.from_dlpack(value) if on_host else value for name, value in found}

    def steer(self, vectors: Mapping[int, Any] | None, scale: float = 1.0) -> _interventions.Undo:
        """From now on adds vectors to the residual stream before layers.

        In prefill and in every decode step (activation addition). What was added before is added no
        more; None turns steering off. All requests that begin from now on are steered: texts,
        scores, logits, hidden states. What has begun before ends as it began.

            >>> engine.steer({3: vector}, scale=4.0)
            >>> engine.steer(None)
            >>> with engine.steer({3: vector}):
            ...     steered = engine.generate("I think that")

        Args:
            vectors: By layer: an array [hidden_size], added at every position; or
                [positions, hidden_size], whose row i is added at position i, and nothing behind the
                last. NumPy, torch (any device), anything that speaks DLPack on the CPU.
            scale: What the vectors are multiplied by, in float32.

        Returns:
            An object for a ``with`` block, which puts back what held before; else to be dropped.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An array has the wrong shape.
            IndexError: There is no such layer.
            ArithmeticError: An array holds NaN or infinity, also after scaling.
        """
        before = self._steering
        self._set_steering(_interventions.steering(vectors, scale, self.config.hidden_size))
        return _interventions.Undo(lambda: self._set_steering(before))

    def ablate(
        self, heads: Mapping[int, Sequence[int]] | None = None, mlps: Sequence[int] = ()
    ) -> _interventions.Undo:
        """From now on leaves attention heads and MLPs out (zero ablation), and only these.

        Without arguments all are back. It holds for what begins from now on, as in :meth:`steer`.

        Args:
            heads: By layer: numbers of heads, whose outputs become zero before attention's output
                projection (TransformerLens' ``hook_z``).
            mlps: Layers whose MLP adds nothing to the residual stream, its bias included
                (``hook_mlp_out``).

        Returns:
            An object for a ``with`` block, which puts back what held before; else to be dropped.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A head or an MLP is named twice.
            IndexError: There is no such layer or head.
            NotImplementedError: The model has more heads than the GPU's kernels have bits for; at
                the next request.
        """
        before = self._ablation
        self._set_ablation(_interventions.ablation(heads, mlps))
        return _interventions.Undo(lambda: self._set_ablation(before))

    def _set_steering(self, steering: _interventions.Steering) -> None:
        _native.engine_steer(self._handle, *steering)
        self._steering = steering

    def _set_ablation(self, ablation: _interventions.Ablation) -> None:
        _native.engine_ablate(self._handle, *ablation)
        self._ablation = ablation

    def measure_read_ceiling(self) -> float:
        """Returns the bytes per second at which the device reads the weights and does no more.

        What decoding could reach at best. Measured once; then statistics tell their share of it.
        """
        return float(_native.engine_measure_read_ceiling(self._handle))

    def __repr__(self) -> str:
        if self._open_handle is None:
            return "Engine(closed)"
        info = self.info
        return f"Engine({info.path!r}, device={info.device!r})"

    def _token_ids(self, prompt: Prompt, name: str = "prompt") -> npt.NDArray[np.int32]:
        return prompt_tokens(name, self.encode(prompt) if is_text(prompt) else prompt)

    def _pair(self, index: int, context: Prompt, continuation: Prompt) -> tuple[Any, Any]:
        """Returns the token ids of a context and its continuation, as vectors of int32."""
        names = f"contexts[{index}]", f"continuations[{index}]"
        if is_text(context) != is_text(continuation):
            raise TypeError(
                f"{names[1]}: expected {'text' if is_text(context) else 'token ids'} as "
                f"{names[0]} is, found {type(continuation).__name__}"
            )
        if not is_text(context):
            return prompt_tokens(names[0], context), prompt_tokens(names[1], continuation)
        texts = utf8(names[0], context), utf8(names[1], continuation)
        try:
            head, tail = _native.engine_encode_pair(self._handle, *texts)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        return head, tail


class _Reporter:
    """A callback that keeps what it raises: tvm-ffi hands on the classes that it knows only."""

    def __init__(self, call: Callable[[int, int], object]) -> None:
        self._call = call
        self.raised: BaseException | None = None

    def __call__(self, done: int, total: int) -> None:
        try:
            self._call(done, total)
        except BaseException as error:
            self.raised = error
            raise


def _reporter(progress: Callable[[int, int], object] | None) -> _Reporter | None:
    return None if progress is None else _Reporter(callback("progress", progress))


def _open_arguments(
    device: str,
    threads: int,
    context: int | None,
    kv_dtype: str | None,
    mode: str,
    max_sequences: int,
    kv_bytes: int,
    prefix_cache: bool,
    draft: str | os.PathLike[str] | None,
    draft_tokens: int,
) -> tuple[Any, ...]:
    """The options of an engine as the library takes them."""
    return (
        text_option("device", device),
        integer("threads", threads, INT32_MIN, INT32_MAX),
        integer("context", context, 0) if context is not None else 0,
        text_option("kv_dtype", kv_dtype) if kv_dtype is not None else "",
        text_option("mode", mode),
        integer("max_sequences", max_sequences, 1),
        integer("kv_bytes", kv_bytes, 0),
        boolean("prefix_cache", prefix_cache),
        _draft(draft),
        integer("draft_tokens", draft_tokens, INT32_MIN, INT32_MAX),
    )


def _draft(draft: str | os.PathLike[str] | None) -> str:
    """Returns "none", "ngram" or a checkpoint's folder."""
    if draft is None or draft == "none":
        return "none"
    if draft == "":
        raise ValueError('draft: expected "none", "ngram" or a checkpoint, found an empty text')
    return "ngram" if draft == "ngram" else hub.resolve(draft)


def _requests(
    prompts: list[dict[str, Any]],
    options: GenerateOptions,
    own_defaults: Callable[[], GenerateOptions],
) -> list[dict[str, Any]]:
    """Returns one request for each prompt, as python/src/convert.cpp reads them."""
    for name in options:
        if name not in _DEFAULTS:
            close = difflib.get_close_matches(name, _DEFAULTS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected one of {list(_DEFAULTS)}"
            raise TypeError(f"unknown option '{name}': {hint}")
    defaults = _DEFAULTS
    if boolean("generation_config", options.get("generation_config", False)):
        defaults = {**_DEFAULTS, **own_defaults()}
    given: GenerateOptions = {**defaults, **options}
    stop_tokens = given["stop_tokens"]
    common = {
        "add_special_tokens": boolean("add_special_tokens", given["add_special_tokens"]),
        "max_new_tokens": integer("max_new_tokens", given["max_new_tokens"]),
        "stop": _stop_texts(given["stop"]),
        "stop_tokens": token_ids("stop_tokens", [] if stop_tokens is None else stop_tokens),
        "ignore_eos": boolean("ignore_eos", given["ignore_eos"]),
        "skip_special_tokens": boolean("skip_special_tokens", given["skip_special_tokens"]),
        "temperature": number("temperature", given["temperature"]),
        "top_k": integer("top_k", given["top_k"], INT32_MIN, INT32_MAX),
        "top_p": number("top_p", given["top_p"]),
        "min_p": number("min_p", given["min_p"]),
        "repetition_penalty": number("repetition_penalty", given["repetition_penalty"]),
        "frequency_penalty": number("frequency_penalty", given["frequency_penalty"]),
        "presence_penalty": number("presence_penalty", given["presence_penalty"]),
        "no_repeat_ngram_size": integer(
            "no_repeat_ngram_size", given["no_repeat_ngram_size"], INT32_MIN, INT32_MAX
        ),
        **_logit_bias(given["logit_bias"]),
        "min_new_tokens": integer("min_new_tokens", given["min_new_tokens"]),
        "allow_padded_ids": boolean("allow_padded_ids", given["allow_padded_ids"]),
        "num_logprobs": _alternatives("logprobs", given["logprobs"]),
        "num_prompt_logprobs": _alternatives("prompt_logprobs", given["prompt_logprobs"]),
    }
    return [
        {**common, **prompt, "seed": seed}
        for prompt, seed in zip(prompts, _seeds(given["seed"], len(prompts)), strict=True)
    ]


def _alternatives(name: str, count: int | None) -> int:
    return -1 if count is None else integer(name, count, 0, 100)


def _batch(name: str, values: object) -> list[Any]:
    """Returns the texts or lists of token ids of a batch."""
    if isinstance(values, list | tuple) and (not values or is_batch(values)):
        return list(values)
    raise TypeError(
        f"{name}: expected a list of texts or of lists of token ids, found {type(values).__name__}"
        + (" of single token ids" if isinstance(values, list | tuple) else "")
    )


def _prompt_fields(name: str, prompt: object) -> dict[str, Any]:
    if is_text(prompt):
        return {"prompt": utf8(name, prompt), "prompt_tokens": np.empty(0, dtype=np.int32)}
    return {"prompt": b"", "prompt_tokens": prompt_tokens(name, prompt)}


def _logit_bias(bias: Mapping[int, float] | None) -> dict[str, Any]:
    if bias is None:
        bias = {}
    if not isinstance(bias, Mapping):
        raise TypeError(
            f"logit_bias: expected a dict of token id to number, found {type(bias).__name__}"
        )
    return {
        "biased_tokens": token_ids("logit_bias", list(bias)),
        "biases": [number(f"logit_bias[{token}]", value) for token, value in bias.items()],
    }


def _stop_texts(stop: Text | Sequence[Text] | None) -> list[bytes]:
    if stop is None:
        return []
    if is_text(stop):
        return [utf8("stop", stop)]
    if not isinstance(stop, Sequence):
        raise TypeError(f"stop: expected a text or several, found {type(stop).__name__}")
    return [utf8(f"stop[{index}]", text) for index, text in enumerate(stop)]


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Returns one seed for each prompt, its 64 bits as those of a signed integer."""
    seeds = list(seed) if isinstance(seed, list | tuple) else [seed] * count
    if len(seeds) != count:
        raise ValueError(
            f"seed: expected one, or one for each of {count} prompts; found {len(seeds)}"
        )
    unsigned = [integer("seed", value, 0, 2**64 - 1) for value in seeds]
    return [value - 2**64 if value >= 2**63 else value for value in unsigned]


def _writable(name: str, array: Any) -> Any:
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name}: expected a DLPack array, found {type(array).__name__}")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name}: expected an array that can be written, found a read-only one")
    return array
