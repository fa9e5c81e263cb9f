"""The hub client's and `datasets`' private names: whether they ask the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rayfin.compat.private import PrivateName

_OFFLINE = partial(
    PrivateName,
    __name__,
    name="HF_HUB_OFFLINE",
    needed_to="read what was downloaded before where the hub does not answer",
    instead="a setting that can be changed after the import, beside the environment variable",
)
_CLIENT = _OFFLINE(module="huggingface_hub.constants")
_DATASETS = _OFFLINE(module="datasets.config")


@contextmanager
def cache_only() -> Iterator[None]:
    """Have neither the hub's client nor `datasets` ask the hub within the block."""
    with _CLIENT.replaced(True), _DATASETS.replaced(True):
        yield
