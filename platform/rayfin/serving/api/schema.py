"""Request bodies; fields and meanings are OpenAI's, and vLLM's beyond them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from rayfin.serving.engine.request import MAX_STOP_TOKENS, MAX_STOPS, MAX_TOP_LOGPROBS

MAX_MESSAGES = 2048
_INT = 2**31 - 1

TokenIdList = Annotated[
    list[Annotated[int, Field(ge=0, le=_INT)]], Field(min_length=1, fail_fast=True)
]

StopTokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=_INT)]], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)
]


class Body(BaseModel):
    """Nothing is coerced, and nothing unknown is passed over."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last event with the whole request's usage."""
    include_obfuscation: bool | None = None
    """Taken, without effect."""


class GenerationBody(Body):
    """What both kinds of completion take."""

    model: str
    """The base's name, `<adapter>`, `<adapter>@<version or alias>`, or `<base>:` before either."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of an answer; engine.max_length bounds prompt and answer together in any case."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token; null is 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT)
    """-1 and 0 consider all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=_INT)
    """Answers to each prompt; with a seed, answer i has seed + i."""
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    """Texts before the first of which an answer ends; a special token's text (`<|im_end|>`) is met
    by the token."""
    stop_token_ids: StopTokenIds | None = None
    """Tokens at the first of which an answer ends, beside those that end it anyway: the base's end
    tokens, what the adapter was taught, and in a chat what the template ends a turn with. Each is
    an id of the served model's vocabulary."""
    ignore_eos: bool | None = None
    """Go on after all that ends an answer but `stop` and `stop_token_ids`, up to max_tokens."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Taken, without effect."""
    metadata: dict[str, str] | None = Field(None, max_length=16, fail_fast=True)
    """Taken, without effect."""
    store: bool | None = None
    """Taken, without effect."""
    service_tier: str | None = None
    """Taken, without effect."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    """Parts are joined by line breaks."""
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    """Given to the chat template."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Given to the chat template."""
    refusal: str | None = None
    """Taken, without effect, as are the next three: clients send answers back as they got them."""
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        """Refuses a part that is no text in one sentence, rather than one for each field."""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                what = f"a part of type {kind[:80]!r}" if isinstance(kind, str) else "such a part"
                raise PydanticCustomError(
                    "text_only",
                    "{what} is not taken: this model reads text alone; send parts of type 'text'",
                    {"what": what},
                )
        return content


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def _is_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Check a tool and leave it as it is: templates write its keys in the order that they have."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if tool.get("type") != "function" or not isinstance(name, str) or not name:
        raise PydanticCustomError(
            "tool", "a tool is {'type': 'function', 'function': {'name': …, 'parameters': …}}"
        )
    return tool


Tools = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_is_function)]],
    Field(max_length=128, fail_fast=True),
]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Tools | None = None
    """Given to the chat template; calls come back as the text that the model wrote."""
    tool_choice: Literal["auto", "none"] | None = None
    """`none` leaves the tools out of the prompt."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Goes before max_tokens; without both, an answer may fill engine.max_length."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    parallel_tool_calls: bool | None = None
    """Taken, without effect."""
    safety_identifier: str | None = None
    """Taken, without effect."""
    prompt_cache_key: str | None = None
    """Taken, without effect."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIdList
        | Annotated[list[TokenIdList], Field(min_length=1, fail_fast=True)]
    )
    """One text or several, or the token ids of one or several."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeBody(Body):
    """POST /tokenize: of a text, or of a conversation as the chat template writes it."""

    model: str | None = None
    """Whose chat template; null is the base's."""
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """The tools of a conversation, which the chat template writes."""
    add_special_tokens: bool | None = None
    """Whether a text gets the tokens that the tokenizer puts around it; null is true."""


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    """The adapter whose next version it becomes."""
    lora_path: str = Field(min_length=1)
    """The adapter's directory or ZIP file on the server, an absolute path, or OWNER/NAME on the
    Hugging Face hub."""
    base_is_right: bool = False
    """You answer for it that the adapter was trained on the served base, where that can't be told
    from its files."""


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    """`name` with all its versions and aliases, or one `name@version`."""


NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
}
"""Fields of OpenAI's requests that would change the answer, and the values that ask for nothing."""
