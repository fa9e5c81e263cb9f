"""What ends an answer, beside the base's own tokens and what a request asks for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from rayfin.errors import AdapterError
from rayfin.models.ends import END_OF_TURN, Ends
from rayfin.serving.api.own_files import read_eos_token
from rayfin.serving.api.templates import Templates
from rayfin.serving.names import Named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_REMEMBERED = 1024


class AnswerEnds:
    """The ends that a version was taught, and those that a conversation's template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, templates: Templates) -> None:
        self._tokenizer, self._templates = tokenizer, templates
        self._taught: OrderedDict[str, Ends] = OrderedDict()

    async def of_chat(self, named: Named) -> Ends:
        """Raises AdapterError or Overloaded."""
        return await self.of_text(named) | await self._templates.ends(named.source)

    async def of_text(self, named: Named) -> Ends:
        """What the version was taught, whatever it is asked; raises AdapterError.

        Training writes it into rayfin.json. Who trained elsewhere may have named the token as the
        end-of-sequence token of the tokenizer beside the adapter.
        """
        if named.source is None:
            return Ends()
        ref = named.source.ref
        if ref not in self._taught:  # a version never changes
            self._taught[ref] = await asyncio.to_thread(self._read, named)
            while len(self._taught) > _REMEMBERED:
                self._taught.popitem(last=False)
        return self._taught[ref]

    def _read(self, named: Named) -> Ends:
        assert named.source is not None
        assert named.version is not None
        ends = Ends()
        if (told := named.version.metadata.get(END_OF_TURN)) is not None:
            try:
                ends = Ends.from_json(told, self._tokenizer)
            except ValueError as error:
                raise AdapterError(
                    f"adapter '{named.source.ref}': {END_OF_TURN} in its rayfin.json can't be used "
                    f"({error}); publish it again, for the base that it was trained on"
                ) from error
        token = read_eos_token(named.source)
        number = self._tokenizer.backend_tokenizer.token_to_id(token) if token else None
        return ends if number is None else ends | Ends((number,))
