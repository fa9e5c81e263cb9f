"""What rayfin uses of other packages' private interfaces: in one place, and where it expects it."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

import pytest

from rayfin import compat
from rayfin.compat.private import PrivateName


def private_names() -> Iterator[PrivateName]:
    for module in pkgutil.iter_modules(compat.__path__, f"{compat.__name__}."):
        for value in vars(import_module(module.name)).values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, PrivateName):
                    yield one


NAMES = [*dict.fromkeys(private_names())]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_private_name_is_where_rayfin_uses_it(name: PrivateName) -> None:
    """After an upgrade: mend the module of `rayfin.compat` that the message names."""
    name.check()
