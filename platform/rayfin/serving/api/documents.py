"""The OpenAPI document: request bodies, responses and their statuses."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from rayfin.serving.api.schema import Body

_REF = "#/components/schemas/{model}"
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON, and last [DONE]."}},
    "required": ["data"],
}


class ResponseDocument(BaseModel):
    """A response as the document describes it; responses themselves are written without it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(ResponseDocument):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(ResponseDocument):
    error: ErrorDetail


class Usage(ResponseDocument):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(ResponseDocument):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatTopLogprob(ResponseDocument):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(ResponseDocument):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(ResponseDocument):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(ResponseDocument):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    """The version that answered: `support@3`, or the base's name."""
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(ResponseDocument):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ResponseDocument):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(ResponseDocument):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    """The version that answered: `support@3`, or the base's name."""
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(ResponseDocument):
    id: str
    """What a request's `model` may be."""
    object: Literal["model"]
    created: int
    """Seconds since 1970; 0 where it isn't known."""
    owned_by: Literal["rayfin"]
    root: str
    """The version that answers now: `support@3`; of the base, its own name."""
    parent: str | None
    """The base's name for an adapter; null for the base."""


class ModelList(ResponseDocument):
    object: Literal["list"]
    data: list[ModelCard]
    not_served: list[str]
    """Versions of the registry that this base refuses, such as those of another base; a request
    for one is told why."""


class Health(ResponseDocument):
    status: Literal["ok"]
    waiting: int
    """Requests that have no row yet."""
    running: int
    """Requests that decode."""
    resident: list[str] = []
    """Adapters ready to decode, the most recently used first. Left out where API keys are needed
    and the request has none that may use all adapters."""


class TokenizeAnswer(ResponseDocument):
    count: int
    max_model_len: int
    tokens: list[int]


class LoadedAdapter(ResponseDocument):
    lora_name: str
    """The version that answers now: `support@4`."""
    is_new: bool
    """False where the latest version was the same already, and none was made."""
    notes: list[str]
    """What whoever added it should know, a sentence each."""


class UnloadedAdapter(ResponseDocument):
    removed: list[str]
    """The versions that are gone."""


def takes(kind: type[Body]) -> dict[str, Any]:
    """Return `openapi_extra` of an endpoint that reads its body itself."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def streams(kind: type[ResponseDocument]) -> dict[str, Any]:
    """Describe a response 200 that is either `kind` or server-sent events."""
    return {
        "description": "The whole answer; with `stream`, its pieces as server-sent events.",
        "model": kind,
        "content": {"text/event-stream": {"schema": _EVENT}},
    }


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        for status in statuses
    }


def describe_bodies(app: FastAPI, kinds: list[type[Body]]) -> None:
    """Adds to the app's document what `takes` refers to."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, schemas = models_json_schema(
                [(kind, "validation") for kind in kinds], ref_template=_REF
            )
            document = original()
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
