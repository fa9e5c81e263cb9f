"""The registry of named, versioned adapters; loads neither torch nor peft."""

from rayfin.adapters.catalog import AdapterVersion, Catalog
from rayfin.adapters.ref import LATEST, AdapterRef, check_alias, check_name
from rayfin.adapters.registry import Registry

__all__ = [
    "LATEST",
    "AdapterRef",
    "AdapterVersion",
    "Catalog",
    "Registry",
    "check_alias",
    "check_name",
]
