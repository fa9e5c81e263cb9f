"""Answer one request for completions: prompts, sequences in the engine, and the response."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from rayfin.config.serving import ApiKey
from rayfin.errors import AdapterError, EngineFailed, Overloaded, RayfinError, Unavailable
from rayfin.models.ends import Ends
from rayfin.serving.api.choice_writers import ChoiceWriter, usage
from rayfin.serving.api.errors import CLIENT_GONE, CONTEXT_LENGTH, ApiError, as_api_error
from rayfin.serving.api.prompts import TokenIds
from rayfin.serving.api.protocol import failure_of
from rayfin.serving.api.request_log import RequestRecord, record_of
from rayfin.serving.api.schema import ChatBody, GenerationBody
from rayfin.serving.api.service import Service
from rayfin.serving.api.stream import EventStream, Generation
from rayfin.serving.engine.request import Chunk, Request, SamplingParams
from rayfin.serving.model_names import ResolvedModel

# How often a version may be removed between the look at the registry and its loading.
_ATTEMPTS = 3


@dataclass(frozen=True)
class GenerationRequest:
    """What one body asks for, whichever endpoint it came to."""

    body: GenerationBody
    key: ApiKey | None
    max_tokens: int | None
    """null: as many as there is room for."""
    params: SamplingParams
    prompts: Callable[[ResolvedModel], Awaitable[list[TokenIds]]]
    ends: Callable[[ResolvedModel], Awaitable[Ends]]
    answers: Callable[[], ChoiceWriter]

    @property
    def n(self) -> int:
        return self.body.n or 1


@dataclass
class _StartedGeneration:
    """Sequences that the engine works on, the first chunk of which has come."""

    named: ResolvedModel
    prompts: list[TokenIds]
    generation: Generation
    first: tuple[int, Chunk]

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        yield self.first
        async for arrived in self.generation:
            yield arrived


def sampling(body: GenerationBody, logprobs: int | None) -> SamplingParams:
    """Raises RequestError for values that can't be used."""
    defaults = SamplingParams()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "ignore_eos",
            "seed",
        )
        if (value := getattr(body, name)) is not None
    }
    return replace(
        defaults,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        top_k=max(body.top_k or 0, 0),
        **given,
    )


async def respond(request: HttpRequest, service: Service, asked: GenerationRequest) -> Response:
    """Return the whole answer, or the stream of its pieces; raises what makes it an error."""
    record = record_of(request)
    record.model = asked.body.model
    try:
        begun = await _begin(request, service, asked)
    except (RayfinError, ApiError) as error:
        found = as_api_error(error, service.names)
        if found.code != CONTEXT_LENGTH:
            raise
        found.param = "messages" if isinstance(asked.body, ChatBody) else "prompt"
        raise found from error
    record.answered_by, record.trial_id = begun.named.answer_name, begun.named.trial_id
    record.prompt_tokens = sum(map(len, begun.prompts))
    record.choices = len(begun.prompts) * asked.n
    answers = asked.answers()
    frame = {
        "id": f"{answers.prefix}-{record.id}",
        "object": answers.piece_object if asked.body.stream else answers.whole_object,
        "created": int(time.time()),
        "model": begun.named.answer_name,
    }
    if asked.body.stream:
        options = asked.body.stream_options
        with_usage = bool(options and options.include_usage)
        events = _events(service, record, begun, answers, frame, with_usage=with_usage)
        return EventStream(events, begun.generation)
    try:
        return await _whole(service, record, begun, answers, frame)
    finally:
        begun.generation.close()


async def _begin(
    request: HttpRequest, service: Service, asked: GenerationRequest
) -> _StartedGeneration:
    """Submits all sequences and waits for the first chunk: until then an error is a status."""
    record = record_of(request)
    named = await service.resolve(asked.body.model, asked.key)
    for attempt in range(_ATTEMPTS):
        record.adapter = named.adapter or service.names.base_name
        prompts = await asked.prompts(named)
        ends = await asked.ends(named)
        # Another id for another attempt: the engine may not have let go of the last one's yet.
        name = f"{record.id}-{attempt}"
        requests = _requests(name, named, prompts, ends, asked, service.engine.max_length)
        generation = Generation(service.engine, requests)
        generation.start(request.receive)
        try:
            index, chunk = await anext(generation)
        except StopAsyncIteration as error:
            raise ClientDisconnect from error
        except BaseException:
            generation.close()
            raise
        if chunk.finish_reason not in ("error", "cancelled"):
            return _StartedGeneration(named, prompts, generation, (index, chunk))
        generation.close()
        if not isinstance(chunk.error, AdapterError) or named.source is None:
            break
        # It may have been removed since it was resolved: then this says who answers now.
        again = await service.resolve(asked.body.model, asked.key, anew=True)
        if again.source == named.source:
            break
        named = again
    raise _failed(chunk, service)


def _requests(
    name: str,
    named: ResolvedModel,
    prompts: Sequence[TokenIds],
    ends: Ends,
    asked: GenerationRequest,
    max_length: int,
) -> list[Request]:
    """Return a sequence for each prompt and each of its n answers, in order."""
    requests: list[Request] = []
    for prompt in prompts:
        room = max(1, max_length - len(prompt))
        params = replace(asked.params, max_tokens=min(asked.max_tokens or room, room))
        for answer in range(asked.n):
            # Else all n would be the same.
            seed = None if params.seed is None else params.seed + answer
            request_id = f"{name}-{len(requests)}"
            one = replace(params, seed=seed)
            streamed = bool(asked.body.stream)
            requests.append(Request(request_id, prompt, one, named.source, streamed, ends))
    return requests


async def _whole(
    service: Service,
    record: RequestRecord,
    begun: _StartedGeneration,
    answers: ChoiceWriter,
    frame: dict[str, Any],
) -> Response:
    chunks: list[list[Chunk]] = [[] for _ in range(record.choices)]
    async for index, chunk in begun.chunks():
        record.took(len(chunk.token_ids))
        if chunk.finish_reason in ("error", "cancelled"):
            raise _failed(chunk, service)
        chunks[index].append(chunk)
    if begun.generation.closed:
        raise ClientDisconnect
    record.finish_reasons = [str(choice[-1].finish_reason) for choice in chunks]
    if service.log is not None and service.log.text:
        record.answers = ["".join(chunk.text for chunk in choice) for choice in chunks]
    choices = [answers.whole(index, choice) for index, choice in enumerate(chunks)]
    counts = usage(record.prompt_tokens, record.completion_tokens)
    return JSONResponse({**frame, "choices": choices, "usage": counts})


async def _events(
    service: Service,
    record: RequestRecord,
    begun: _StartedGeneration,
    answers: ChoiceWriter,
    frame: dict[str, Any],
    *,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    keeps_text = service.log is not None and service.log.text
    texts = [""] * record.choices
    counts = {"usage": None} if with_usage else {}
    record.finish_reasons = [""] * record.choices
    for index in range(record.choices):
        if (opening := answers.opening(index)) is not None:
            yield _event({**frame, "choices": [opening], **counts})
    async for index, chunk in begun.chunks():
        record.took(len(chunk.token_ids))
        if chunk.finish_reason in ("error", "cancelled"):
            error = _failed(chunk, service)
            record.status = error.status
            yield _event(error.as_json())
            break  # [DONE] would say that the answer is whole
        if keeps_text:
            texts[index] += chunk.text
        record.finish_reasons[index] = chunk.finish_reason or ""
        if chunk.text or chunk.logprobs or chunk.finish_reason:
            yield _event({**frame, "choices": [answers.piece(index, chunk)], **counts})
    else:
        if begun.generation.closed:
            record.status = CLIENT_GONE
        elif with_usage:
            total = usage(record.prompt_tokens, record.completion_tokens)
            yield _event({**frame, "choices": [], "usage": total})
        yield b"data: [DONE]\n\n"
    record.answers = texts if keeps_text else []


def _failed(chunk: Chunk, service: Service) -> ApiError:
    """Return why a sequence ended without an answer."""
    if isinstance(chunk.error, Overloaded | Unavailable):
        return as_api_error(chunk.error, service.names)
    if chunk.finish_reason == "cancelled" or failure_of(service.engine) is not None:
        return ApiError(
            503,
            "the server is stopping; try again",
            code="stopping",
            headers={"retry-after": "1"},
        )
    return as_api_error(chunk.error or EngineFailed("the engine failed"), service.names)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
