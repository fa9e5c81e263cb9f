"""The interface that the API needs of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rayfin.serving.engine.request import Request, Sink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ServedEngine(Protocol):
    """An engine, rayfin's own or another. All but the fields may be used from any thread."""

    tokenizer: PreTrainedTokenizerFast
    """The base model's."""
    model_name: str
    max_length: int
    """Tokens of a prompt and its answer together."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; raises RequestError or Overloaded."""

    def cancel(self, request_id: str) -> None:
        """Ends a request; one that isn't there is no error."""

    def resident(self) -> dict[str, int]:
        """Return the adapters ready to decode, the latest used first, and the bytes of each."""

    def stats(self) -> Any:
        """Return a dataclass of whole numbers: counts since the start, and gauges."""


def failure_of(engine: ServedEngine) -> BaseException | None:
    """Return why the engine has stopped for good; None while it is well, or doesn't say."""
    failure: BaseException | None = getattr(engine, "failure", None)
    return failure
