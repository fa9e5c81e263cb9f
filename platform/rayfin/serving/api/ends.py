"""Where an answer ends, beside the base's own tokens and what a request asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfin.errors import AdapterError
from rayfin.models.ends import END_OF_TURN, Ends
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.templates import Templates
from rayfin.serving.model_names import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class AnswerEnds:
    """Knows the ends that a version was taught, and those that a conversation's template writes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, templates: Templates, own: AdapterTokenizers
    ) -> None:
        self._tokenizer, self._templates, self._own = tokenizer, templates, own

    async def of_chat(self, named: ResolvedModel) -> Ends:
        """Returns the ends of an answer in a conversation.

        Raises AdapterError, Unavailable or Overloaded.
        """
        return await self.of_text(named) | await self._templates.ends(named.source)

    async def of_text(self, named: ResolvedModel) -> Ends:
        """Returns the ends that the version was taught, which hold for any prompt.

        Training writes them into rayfin.json. An adapter that was trained elsewhere may name its
        end as the end-of-sequence token of its own tokenizer. Raises AdapterError or Unavailable.
        """
        if named.source is None or named.version is None:
            return Ends()
        ends = Ends()
        if (told := named.version.metadata.get(END_OF_TURN)) is not None:
            try:
                ends = Ends.from_json(told, self._tokenizer)
            except ValueError as error:
                raise AdapterError(
                    f"adapter '{named.source.ref}': {END_OF_TURN} in its rayfin.json can't be used "
                    f"({error}); publish it again, for the base that it was trained on"
                ) from error
        token = (await self._own.of(named.source)).eos_token
        token_id = self._tokenizer.backend_tokenizer.token_to_id(token) if token else None
        return ends if token_id is None else ends | Ends((token_id,))
