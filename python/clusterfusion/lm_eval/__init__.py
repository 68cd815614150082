"""Models of this package for lm-evaluation-harness (extra ``lm-eval``).

``lm_eval --model clusterfusion --model_args pretrained=FOLDER`` where lm_eval finds models of other
packages by their entry points; ``python -m clusterfusion.lm_eval`` with the same arguments where it
does not; or ``import clusterfusion.lm_eval`` before ``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f"clusterfusion.lm_eval needs lm-evaluation-harness, which cannot be imported ({error}); "
        "install it with: python -m pip install 'clusterfusion-lm[lm-eval]'"
    ) from error
from tqdm import tqdm

from clusterfusion import _evaluation
from clusterfusion.engine import Engine

__all__ = ["ClusterFusionLM"]

_logger = logging.getLogger(__name__)
_ItemT = TypeVar("_ItemT")


@register_model("clusterfusion")
class ClusterFusionLM(TemplateLM):
    """A GPT-NeoX checkpoint, evaluated as lm-evaluation-harness's own ``hf`` model would.

    Tokens, the prefix of an empty context, truncation from the left, rolling windows and stops are
    those of ``hf``.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        threads: int = 0,
        kv_dtype: str | None = None,
        mode: str = "latency",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """Opens a checkpoint.

        Args:
            pretrained: A folder, or a model's name on the hub: the path of :class:`Engine`.
            revision: Of a name on the hub.
            device: "cpu", "cuda", or "auto": the GPU if there is one that is supported. "cuda:0",
                which lm_eval passes if no device is named, is "auto".
            dtype: "auto" or the checkpoint's own; the engine does not convert weights. On the CPU
                also "float32", in which all sums are computed there.
            batch_size: Requests that go to the engine at once; "auto" for max_batch_size.
            max_batch_size: Of batch_size="auto"; 512 if not given.
            max_length: The longest context in tokens; None for the model's own.
            max_gen_toks: New tokens of a generation for which the task sets no limit.
            add_bos_token: Whether texts begin with the bos token; None for the tokenizer's way.
            prefix_token_id: What an empty context stands for; None for the tokenizer's bos token,
                or else its eos token.
            threads: Of :class:`Engine`.
            kv_dtype: Of :class:`Engine`.
            mode: Of :class:`Engine`: "throughput" generates quicker on a GPU in batches.
            seed: Of the first sampled text; each further one has the next.
            trust_remote_code: Taken for the sake of ``hf``'s commands; no code is ever run.

        Raises:
            ValueError: An argument is wrong, or the checkpoint has no token to begin or end a text.
        """
        super().__init__()
        self.pretrained = pretrained
        self.revision = revision
        self.batch_size = _evaluation.batch_requests(batch_size, max_batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self._next_seed = int(seed)
        self._open_engine(device, threads=threads, context=max_length, kv_dtype=kv_dtype, mode=mode)
        _evaluation.check_dtype(dtype, self.engine.config.dtype, self.engine.device)
        self._find_special_tokens(prefix_token_id)

    def _open_engine(
        self, device: str | None, *, threads: int, context: int | None, **options: Any
    ) -> None:
        self.engine = Engine(
            self.pretrained,
            _evaluation.device_name(device),
            threads=int(threads),
            context=None if context is None else int(context),
            revision=None if self.revision is None else str(self.revision),
            **options,
        )
        info = self.engine.info
        self.max_length = info.max_positions
        self._device = self.engine.device
        _logger.info("%s on %s: %s", self.pretrained, info.device_description, info.device_reason)

    def _find_special_tokens(self, prefix_token_id: int | None) -> None:
        self._bos, eos = _evaluation.special_token_ids(
            Path(self.engine.info.path), self.engine.tokenizer, self.engine.config
        )
        if eos is None:
            raise ValueError(
                f"{self.pretrained}: expected an eos_token in tokenizer_config.json or "
                "config.json, found none"
            )
        self._eos = eos
        self._prefix = int(prefix_token_id) if prefix_token_id is not None else self._bos

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for."""
        return self._eos if self._prefix is None else self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's cache of requests."""
        return str(self.pretrained).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Describes the model in the results."""
        info = self.engine.info
        return {
            "model_num_parameters": info.num_parameters,
            "model_dtype": self.engine.config.dtype,
            "model_revision": self.revision,
            "model_device": info.device_description,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text; one that begins with the prefix's text gets no further special token."""
        prefix = self.engine.decode([self.prefix_token_id], skip_special_tokens=False)
        if add_special_tokens is None and string.startswith(prefix):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
        special = add_special_tokens is not False
        tokens = self.engine.encode(text, add_special_tokens=special)
        if special and self.add_bos_token and self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        results = []
        with self._progress(len(pairs), "Running loglikelihood requests", disable_tqdm) as bar:
            for batch in _batches(pairs, self.batch_size):
                results += self.engine.loglikelihood(
                    [context for context, _ in batch], [continuation for _, continuation in batch]
                )
                bar.update(len(batch))
        answers = [(result.total, result.is_greedy) for result in results]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Computes the log-likelihoods of whole texts, each token once, in windows."""
        windows = []
        owners = []
        for index, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, found):
                windows.append(self._fit(context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        label = "Running loglikelihood_rolling requests"
        with self._progress(len(windows), label, disable_tqdm) as bar:
            for batch in _batches(list(zip(owners, windows, strict=True)), self.batch_size):
                scores = self.engine.score([[*pair[0], *pair[1]] for _, pair in batch])
                for (owner, (_, continuation)), score in zip(batch, scores, strict=True):
                    totals[owner] += float(score.logprobs[-len(continuation) :].sum(dtype=float))
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates texts up to the first stop; requests of the same arguments go together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        texts: dict[int, str] = {}
        label = "Running generate_until requests"
        with self._progress(len(requests), label, disable_tqdm) as bar:
            for group in groups.values():
                arguments = requests[group[0]].args[1]
                for batch in _batches(group, self.batch_size):
                    contexts = [requests[index].args[0] for index in batch]
                    texts.update(zip(batch, self._generate(contexts, arguments), strict=True))
                    bar.update(len(batch))
                    for index in batch:
                        request = requests[index].args
                        self.cache_hook.add_partial("generate_until", request, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(self, contexts: Sequence[str], arguments: dict[str, Any]) -> list[str]:
        stops, options = _evaluation.generate_options(arguments, self.max_gen_toks)
        end = self.engine.decode([self._eos], skip_special_tokens=False)
        if end not in stops:
            stops.append(end)
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks: expected less than the context's {self.max_length} tokens, found "
                f"{options['max_new_tokens']}"
            )
        prompts = [self._encode(context, self._special(context))[-room:] for context in contexts]
        results = self.engine.generate(
            prompts,
            stop=[stop for stop in stops if stop],
            stop_tokens=[self._eos],
            seed=[self._next_seed + i for i in range(len(prompts))],
            allow_padded_ids=True,  # hf draws them
            **options,
        )
        self._next_seed += len(prompts)
        # The engine's text ends before the stop that came first; of those that overlap, lm_eval
        # takes the first in the list.
        return [
            _evaluation.cut_at_stops(self.engine.decode(result.tokens), stops) for result in results
        ]

    def _special(self, context: str) -> bool | None:
        """False for a context that begins with the bos token's text; hf looks for that one here."""
        if self._bos is None:
            return None
        bos = self.engine.decode([self._bos], skip_special_tokens=False)
        return False if context.startswith(bos) else None

    def _fit(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        pair = _evaluation.truncate_left(context, continuation, self.max_length)
        if lost := len(context) - len(pair[0]):
            _logger.warning(
                "a context of %d tokens and its continuation of %d exceed the longest context of "
                "%d; leaving out %d tokens from the left",
                len(context),
                len(continuation),
                self.max_length,
                lost,
            )
        return pair

    def _progress(self, total: int, label: str, disabled: bool) -> tqdm[Any]:
        return tqdm(total=total, desc=label, disable=disabled or self.rank != 0)


def _batches(items: Sequence[_ItemT], size: int) -> Iterator[Sequence[_ItemT]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
