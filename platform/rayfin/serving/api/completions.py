"""Routes of POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rayfin.errors import RequestError
from rayfin.serving.api.choice_writers import ChatChoiceWriter, CompletionChoiceWriter
from rayfin.serving.api.documents import (
    ChatCompletion,
    Completion,
    failures,
    streams,
    takes,
)
from rayfin.serving.api.errors import ApiError
from rayfin.serving.api.generate import GenerationRequest, respond, sampling
from rayfin.serving.api.prompts import TokenIds
from rayfin.serving.api.request_body import read_body
from rayfin.serving.api.request_log import record_of
from rayfin.serving.api.schema import ChatBody, CompletionBody, GenerationBody
from rayfin.serving.api.service import Service
from rayfin.serving.engine.request import check_stop_tokens
from rayfin.serving.model_names import ResolvedModel

_FAILURES = (400, 401, 403, 404, 408, 413, 429, 503)
# OpenAI's, for completions that don't say.
_MAX_TOKENS = 16


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()
    config = service.config

    @router.post(
        "/v1/chat/completions",
        openapi_extra=takes(ChatBody),
        responses={200: streams(ChatCompletion), **failures(*_FAILURES)},
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation, whole or as server-sent events."""
        key = service.admit(request)
        body = await read_body(request, ChatBody, config)
        _check(body, service)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if service.log is not None and service.log.text:
            record_of(request).prompt = [m.model_dump(exclude_none=True) for m in body.messages]

        tools = None if body.tool_choice == "none" else body.tools

        async def prompts(named: ResolvedModel) -> list[TokenIds]:
            return [await service.prompts.of_chat(named.source, body.messages, tools)]

        asked = GenerationRequest(
            body,
            key,
            body.max_completion_tokens or body.max_tokens,
            sampling(body, logprobs),
            prompts,
            service.ends.of_chat,
            lambda: ChatChoiceWriter(service.tokens, logprobs=logprobs is not None),
        )
        return await respond(request, service, asked)

    @router.post(
        "/v1/completions",
        openapi_extra=takes(CompletionBody),
        responses={200: streams(Completion), **failures(*_FAILURES)},
    )
    async def create_completion(request: Request) -> Response:
        """Continues texts, whole or as server-sent events."""
        key = service.admit(request)
        body = await read_body(request, CompletionBody, config)
        _check(body, service)
        if service.log is not None and service.log.text:
            record_of(request).prompt = body.prompt

        async def prompts(_: ResolvedModel) -> list[TokenIds]:
            return await service.prompts.of_completion(body.prompt, config.max_n // (body.n or 1))

        asked = GenerationRequest(
            body,
            key,
            body.max_tokens or _MAX_TOKENS,
            sampling(body, body.logprobs),
            prompts,
            service.ends.of_text,
            lambda: CompletionChoiceWriter(service.tokens, logprobs=body.logprobs is not None),
        )
        return await respond(request, service, asked)

    return router


def _check(body: GenerationBody, service: Service) -> None:
    max_n = service.config.max_n
    try:
        check_stop_tokens(body.stop_token_ids or (), len(service.engine.tokenizer))
    except RequestError as error:
        raise ApiError(400, str(error), param="stop_token_ids") from error
    if (body.n or 1) > max_n:
        raise ApiError(400, f"n is {body.n}; give 1 to {max_n} (api.max_n)", param="n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
