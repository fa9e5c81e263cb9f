"""A client of the served API, as small as `rayfin chat` and the examples need it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from rayfin.errors import AdapterNotFound, RayfinError, RequestError
from rayfin.redaction import redact_url
from rayfin.serving.local_api import Endpoint

# Between two events of an answer; the first one may wait for a queue and a cold adapter.
_READ_SECONDS = 300.0
_CONNECT_SECONDS = 10.0


@dataclass
class ChatStream:
    """An answer that arrives: iterate for its text, once; the other fields are set as they come.

    Leaving the iteration early, by `close`, ends the request on the server.
    """

    pieces: Iterator[str]
    model: str = ""
    """The version that answers."""
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def close(self) -> None:
        self.pieces.close()  # type: ignore[attr-defined]


class Client:
    """A client of one deployment; a context manager.

    Raises AdapterNotFound for unknown names, RequestError for what else the API refuses, and
    RayfinError where it can't be reached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self.url = endpoint.url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            )
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise RequestError(
                f"'{redact_url(endpoint.url)}' is no URL of an API ({error})"
            ) from error
        if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
            raise RequestError(
                f"'{redact_url(endpoint.url)}' is no URL of an API; write http://HOST:PORT"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Return every name that is answered to; the base model is the first."""
        try:
            return [str(card["id"]) for card in self._get("/v1/models")["data"]]
        except (KeyError, TypeError) as error:
            raise self._stranger() from error

    def resolve(self, model: str) -> str:
        """Return the version that answers to `model` now."""
        try:
            return str(self._get(f"/v1/models/{quote(model, safe='')}")["root"])
        except (KeyError, TypeError) as error:
            raise self._stranger() from error

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> ChatStream:
        """Asks for an answer, streamed; errors come with the first piece."""
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        stream = ChatStream(iter(()))
        stream.pieces = self._stream(body, stream)
        return stream

    def _stream(self, body: Mapping[str, Any], stream: ChatStream) -> Iterator[str]:
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RayfinError(str(event["error"].get("message", event["error"])))
                    stream.model = event.get("model") or stream.model
                    stream.usage = event.get("usage") or stream.usage
                    for choice in event.get("choices", ()):
                        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
                        if text := choice["delta"].get("content"):
                            stream.text += text
                            yield text
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise self._stranger() from error

    def _get(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response)
        try:
            value: dict[str, Any] = response.json()
        except ValueError as error:
            raise self._stranger() from error
        return value

    def _stranger(self) -> RayfinError:
        return RayfinError(f"what answers at {self.url} is not rayfin's API")

    def _unreachable(self, error: httpx.HTTPError) -> RayfinError:
        why = str(error) or type(error).__name__
        return RayfinError(f"{self.url} can't be reached ({why}); is `rayfin serve` running there?")


def _refusal(response: httpx.Response) -> RayfinError:
    """Return the error that the API's error envelope describes."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code} from {response.url}"
    if response.status_code == 404:
        return AdapterNotFound(message)
    return RequestError(message) if response.status_code < 500 else RayfinError(message)
