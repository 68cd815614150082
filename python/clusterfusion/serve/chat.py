"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from clusterfusion.engine import Engine
from clusterfusion.serve.chat_template import TemplateRefusedError
from clusterfusion.serve.errors import ApiError
from clusterfusion.serve.feed import Event, Result
from clusterfusion.serve.generation import answer_request, dumps, engine_options, quoted
from clusterfusion.serve.schema import ChatRequest
from clusterfusion.serve.service import FINISH_REASONS, Job, Service
from clusterfusion.serve.texts import chat_logprobs, prompt_logprobs

_PAGE_POSITIONS = 64  # of ServingStatistics.kv_pages


async def chat_completions(service: Service, http: Request) -> Response:
    """Answers a request."""
    request = await service.read(http, ChatRequest)
    text = _prompt(service, request)
    if service.settings.log_prompts:
        http.state.record.prompts = [text]
    # A template writes the special tokens that it wants.
    tokens = await service.encode(text, add_special_tokens=False)
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(_positions(service.engine) - len(tokens), 1)
    service.check_prompt(tokens, max_tokens, "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    options = engine_options(service, request, 1, max_tokens, logprobs, request.prompt_logprobs)
    answer = _ChatAnswer(service, request, tokens)
    return await answer_request(service, http, request, [tokens], options, answer)


def _positions(engine: Engine) -> int:
    """How long a text can become: by the context, and by all of the KV cache."""
    of_cache = engine.serving_statistics().kv_pages * _PAGE_POSITIONS
    return min(engine.info.max_positions, of_cache)


def _prompt(service: Service, request: ChatRequest) -> str:
    template = service.chat_template
    if template is None:
        raise ApiError(
            400,
            "the model has no chat template: use /v1/completions, or start the server with "
            "--chat-template FILE",
            param="messages",
            code="no_chat_template",
        )
    continues = bool(request.continue_final_message)
    begins = not continues if request.add_generation_prompt is None else None
    messages = [message.model_dump(exclude_unset=True) for message in request.messages]
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    more = request.chat_template_kwargs or {}
    if reserved & more.keys():
        raise ApiError(
            400,
            f"chat_template_kwargs: {sorted(reserved & more.keys())} have fields of their own",
            param="chat_template_kwargs",
            code="invalid_value",
        )
    try:
        return template.render(
            messages,
            add_generation_prompt=bool(request.add_generation_prompt) if begins is None else begins,
            continue_final_message=continues,
            variables=more,
        )
    except TemplateRefusedError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None


class _ChatAnswer:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, service: Service, request: ChatRequest, tokens: list[int]) -> None:
        self._texts = service.texts
        self._request = request
        self._tokens = tokens

    def opening(self) -> list[str]:
        return [
            dumps(
                {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            )
            for index in range(self._request.n or 1)
        ]

    async def chunk(self, job: Job, event: Event) -> str:
        delta = f'{{"content":{quoted(event.text)}}}'
        logprobs = "null"
        if self._request.logprobs:
            logprobs = dumps(chat_logprobs(self._texts, event.read_scores()))
        reason = "null"
        if event.finish_reason is not None:
            reason = quoted(FINISH_REASONS[event.finish_reason])
        more = ""
        if self._request.return_token_ids:
            more = f',"token_ids":{dumps(event.tokens)}'
        return (
            f'{{"index":{event.index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{more}}}'
        )

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        request = self._request
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": None,
            "finish_reason": FINISH_REASONS[result.finish_reason],
        }
        if request.logprobs:
            choice["logprobs"] = chat_logprobs(self._texts, result.scores.read())
        if request.prompt_logprobs is not None:
            scores = result.prompt_scores.read()
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, scores)
        if request.return_token_ids:
            choice["prompt_token_ids"] = self._tokens
            choice["token_ids"] = result.tokens
        return choice
