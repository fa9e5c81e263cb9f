"""Turn what a client wrote into the token ids that the engine takes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from rayfin.errors import RequestError
from rayfin.serving.api.schema import Message
from rayfin.serving.api.templates import Templates
from rayfin.serving.engine.request import AdapterSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokenIds = tuple[int, ...]
CompletionPrompt = str | list[str] | list[int] | list[list[int]]

# Shorter texts are tokenised faster than a thread takes them over.
_SHORT = 4096


class Prompts:
    """Makes prompts, by the base model's tokenizer and the templates of adapters and base."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, templates: Templates) -> None:
        # Straight to the backend, which many threads may use; the class around it sets padding
        # and truncation at every call, which they may not.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._templates = templates

    async def of_chat(
        self,
        source: AdapterSource | None,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
    ) -> TokenIds:
        """Raises RequestError, AdapterError or Overloaded."""
        conversation = [as_template_takes(message) for message in messages]
        text = await self._templates.render(source, conversation, tools or None)
        # The template has written the special tokens.
        return await self.of_text(text, special_tokens=False)

    async def of_text(self, text: str, *, special_tokens: bool = True) -> TokenIds:
        if len(text) <= _SHORT:
            return self._encode(text, special_tokens)
        return await asyncio.to_thread(self._encode, text, special_tokens)

    async def of_completion(self, prompt: CompletionPrompt, most: int) -> list[TokenIds]:
        """Raises RequestError for more than `most` prompts."""
        prompts = _separate(prompt)
        if len(prompts) > most:
            raise RequestError(
                f"there are {len(prompts)} prompts with n answers each, and room for {most} such "
                "prompts; send fewer in one request, or raise api.max_n"
            )
        return [await self.of_text(p) if isinstance(p, str) else tuple(p) for p in prompts]

    def _encode(self, text: str, special_tokens: bool) -> TokenIds:
        return tuple(self._backend.encode(text, add_special_tokens=special_tokens).ids)


def as_template_takes(message: Message) -> dict[str, Any]:
    """Return a message for a chat template: its parts joined, and nothing that is null."""
    content, calls = message.content, message.tool_calls
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    fields = {
        "role": message.role,
        # Templates add it to texts; a call of tools has none.
        "content": content or "",
        "name": message.name,
        "tool_calls": None if calls is None else [_with_arguments(call) for call in calls],
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as in training; OpenAI's are its JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _separate(prompt: CompletionPrompt) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt
