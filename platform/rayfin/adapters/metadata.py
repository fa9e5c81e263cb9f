"""Read rayfin.json: check it against the files beside it, and read the base from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfin.adapters.files import CONFIGS, read_json
from rayfin.models.bases import BASE_IDENTITY, MAX_NAME, Base
from rayfin.paths import METADATA, digest_files

_SHA256 = re.compile(r"[0-9a-f]{64}")


def are_digests(files: Any) -> bool:
    """Whether a value is the sizes and SHA-256 digests of an adapter's files, as publishing writes.

    A configuration and weights must be among them.
    """
    return (
        isinstance(files, dict)
        and any(name in files for name in CONFIGS)
        and any(str(name).endswith(".safetensors") for name in files)
        and all(
            isinstance(digest, dict)
            and type(digest.get("bytes")) is int
            and _SHA256.fullmatch(str(digest.get("sha256"))) is not None
            for digest in files.values()
        )
    )


def trusted_metadata(directory: Path, *, whole: bool = False) -> dict[str, Any]:
    """Return rayfin.json if its digests match the files beside it, else an empty object.

    A handwritten file, or one that was copied beside other files, can't be relied upon. All sizes
    and the digest of the configuration are compared; with `whole`, every digest. Raises
    AdapterError where rayfin.json can't be read, and OSError where the files can't.
    """
    try:
        told = read_json(directory / METADATA)
    except FileNotFoundError:
        return {}
    files: Any = told.get("files")
    if not are_digests(files) or any(Path(str(name)).name != name for name in files):
        return {}
    paths = {name: directory / name for name in files}
    # Size and kind first: what is no regular file, or is another file, is not read.
    for name, path in paths.items():
        if path.is_symlink() or not path.is_file() or path.stat().st_size != files[name]["bytes"]:
            return {}
    if whole:
        return told if digest_files(paths) == files else {}
    config = next(name for name in CONFIGS if name in files)
    found = hashlib.sha256(paths[config].read_bytes()).hexdigest()
    return told if found == files[config]["sha256"] else {}


def claimed_base(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Base | None:
    """Return the base that an adapter names, or None.

    `metadata`, which must be trusted, takes precedence over `config`, which PEFT wrote.
    """
    name = metadata.get("base_model") or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    identities = metadata.get(BASE_IDENTITY)
    told = identities if isinstance(identities, list) else []
    return Base(name, tuple(one for one in told if isinstance(one, str) and len(one) < MAX_NAME))
