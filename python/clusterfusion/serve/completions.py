"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from clusterfusion.serve.feed import Event, Result, TokenScore
from clusterfusion.serve.generation import answer_request, dumps, engine_options, quoted
from clusterfusion.serve.schema import CompletionRequest
from clusterfusion.serve.service import FINISH_REASONS, Job, Service
from clusterfusion.serve.texts import CompletionLogprobs, prompt_logprobs

_DEFAULT_MAX_TOKENS = 16  # the OpenAI API's


async def completions(service: Service, http: Request) -> Response:
    """Answers a request."""
    request = await service.read(http, CompletionRequest)
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    prompts = await _prompts(service, request, max_tokens)
    if service.settings.log_prompts:
        http.state.record.prompts = [text for text, _ in prompts]
    options = engine_options(
        service, request, len(prompts), max_tokens, request.logprobs, _prompt_scores(request)
    )
    answer = _CompletionAnswer(service, request, prompts)
    ids = [tokens for _, tokens in prompts]
    return await answer_request(service, http, request, ids, options, answer)


async def _prompts(
    service: Service, request: CompletionRequest, max_tokens: int
) -> list[tuple[str | None, list[int]]]:
    """Each prompt's text, where that was given, and its token ids."""
    given = request.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts = []
    for index, one in enumerate(given if several else [given]):
        name = f"prompt[{index}]" if several else "prompt"
        text = one if isinstance(one, str) else None
        tokens = one if text is None else await service.encode(text, _adds_special(request))
        service.check_prompt(tokens, max_tokens, name)
        prompts.append((text, tokens))
    return prompts


def _adds_special(request: CompletionRequest) -> bool:
    return request.add_special_tokens is not False


def _prompt_scores(request: CompletionRequest) -> int | None:
    """How many of the likeliest tokens are wanted at each place of the prompt; None: no scores."""
    wanted = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((one for one in wanted if one is not None), default=None)


class _CompletionAnswer:
    object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[tuple[str | None, list[int]]],
    ) -> None:
        self._service = service
        self._request = request
        self._prompts = prompts
        self._n = request.n or 1
        self._begun: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def opening(self) -> list[str]:
        return []

    async def chunk(self, job: Job, event: Event) -> str:
        index = event.index
        request = self._request
        is_first = index not in self._begun
        text, scores, more = event.text, list[TokenScore | int](event.read_scores()), ""
        if request.return_token_ids:
            more = f',"token_ids":{dumps(event.tokens)}'
        if is_first:
            self._begun.add(index)
            prompt_scores = await self._scores_of_prompt(job, index)
            more += self._about_prompt(index, prompt_scores)
            if request.echo:
                text = self._echo(index) + text
                scores = self._echoed(index, prompt_scores, scores)
        logprobs = "null"
        if request.logprobs is not None:
            is_last = event.finish_reason is not None
            logprobs = dumps(self._logprobs_of(index).chunk(scores, text, is_last))
        reason = "null" if event.finish_reason is None else quoted(_reason(event.finish_reason))
        return (
            f'{{"index":{index},"text":{quoted(text)},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{more}}}'
        )

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        request = self._request
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo(index) + result.text if request.echo else result.text,
            "logprobs": None,
            "finish_reason": _reason(result.finish_reason),
        }
        if request.logprobs is not None:
            scores = list[TokenScore | int](result.scores.read())
            if request.echo:
                scores = self._echoed(index, result.prompt_scores.read(), scores)
            logprobs = self._logprobs_of(index).chunk(scores, choice["text"], is_last=True)
            choice["logprobs"] = logprobs
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._vllm_scores(result.prompt_scores.read())
        if request.return_token_ids:
            choice["prompt_token_ids"] = result.prompt_tokens
            choice["token_ids"] = result.tokens
        return choice

    async def _scores_of_prompt(self, job: Job, index: int) -> list[TokenScore]:
        if _prompt_scores(self._request) is None:
            return []
        scores: list[TokenScore] = await job.prompt_scores(index)
        return scores

    def _about_prompt(self, index: int, scores: list[TokenScore]) -> str:
        """The fields of a text's first chunk that concern its prompt."""
        more = ""
        if self._request.prompt_logprobs is not None:
            more += f',"prompt_logprobs":{dumps(self._vllm_scores(scores))}'
        if self._request.return_token_ids:
            more += f',"prompt_token_ids":{dumps(self._tokens(index))}'
        return more

    def _vllm_scores(self, scores: list[TokenScore]) -> list[dict[str, dict[str, Any]] | None]:
        return prompt_logprobs(self._service.texts, _cut(scores, self._request.prompt_logprobs))

    def _tokens(self, index: int) -> list[int]:
        return self._prompts[index // self._n][1]

    def _echo(self, index: int) -> str:
        text, tokens = self._prompts[index // self._n]
        if text is not None:
            return text
        if not self._service.engine.info.has_tokenizer:
            return ""
        return self._service.engine.decode(tokens, skip_special_tokens=False)

    def _shown(self, index: int) -> list[int]:
        """The prompt's tokens that stand in its echo: not those that the tokenizer adds."""
        text, tokens = self._prompts[index // self._n]
        if text is None:
            return tokens
        return self._service.engine.encode(text, add_special_tokens=False)

    def _echoed(
        self, index: int, prompt_scores: list[TokenScore], scores: list[TokenScore | int]
    ) -> list[TokenScore | int]:
        """The prompt's tokens before the new ones; nothing predicts the first."""
        of_prompt = _cut(prompt_scores, self._request.logprobs)
        return [self._tokens(index)[0], *of_prompt, *scores]

    def _logprobs_of(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            request, texts = self._request, self._service.texts
            skips_special = request.skip_special_tokens is not False
            made = CompletionLogprobs(texts, request.logprobs or 0, skips_special)
            if request.echo:
                text = self._echo(index)
                tokens, shown = self._tokens(index), self._shown(index)
                made.begin_with(texts.offsets_in_prompt(tokens, shown, text), len(text))
            self._logprobs[index] = made
        return self._logprobs[index]


def _cut(scores: list[TokenScore], top: int | None) -> list[TokenScore]:
    """With `top` of the likeliest tokens, where the engine was asked for more."""
    return [score._replace(top=score.top[: top or 0]) for score in scores]


def _reason(number: int) -> str:
    return FINISH_REASONS[number]
