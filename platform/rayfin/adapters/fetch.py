"""Fetch an adapter from a directory, a ZIP file or the hub, as a directory to read.

A ZIP file is not trusted: its table of contents is checked before a byte is unpacked, and only an
adapter's own files are written, under fixed names.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rayfin import hub
from rayfin.adapters.files import (
    CONFIGS,
    MAX_JSON_BYTES,
    READ_AS_JSON,
    adapter_files,
    storage_errors,
)
from rayfin.errors import AdapterError
from rayfin.models.bases import hub_id
from rayfin.models.quiet import no_progress_bars

MAX_ENTRIES = 10_000
"""The most files and directories that a ZIP file may have."""
MAX_TABLE_BYTES = 4 * 2**20
"""The largest table of contents of a ZIP file that is read, in bytes; it is uncompressed."""
MAX_BYTES = 16 * 2**30
"""The most bytes that a ZIP file may unpack to, or that are downloaded of an adapter."""
# What zipfile and its decompressors raise for a file that isn't as its headers say.
_DAMAGED = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    EOFError,
    NotImplementedError,
    ValueError,  # an offset before the file's beginning, and names that are no UTF-8
    OverflowError,
    zlib.error,
    lzma.LZMAError,
)
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


@dataclass(frozen=True)
class FetchedAdapter:
    """A directory to publish an adapter from, which lasts as long as its context."""

    directory: Path
    source: str
    """The source as the user wrote it, or `hf:ID@COMMIT` for the hub."""
    left_out: tuple[str, ...]
    """The names of the files that are not part of an adapter, sorted."""


@contextmanager
def fetch_adapter(source: str) -> Iterator[FetchedAdapter]:
    """Yield the adapter at `source`; raises AdapterError where there is none, or none to be had."""
    try:
        path = Path(source).expanduser()
        is_directory = path.is_dir()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(
            f"'{source[:120]}' can't be looked up ({reason}); give a directory with "
            "adapter_config.json, a ZIP file of one, or OWNER/NAME on the Hugging Face hub"
        ) from error
    if is_directory:
        with storage_errors(f"'{path}'"):
            names = sorted(entry.name for entry in path.iterdir())
        if not set(CONFIGS) & set(names) and (path / "adapter" / CONFIGS[0]).is_file():
            raise AdapterError(f"'{path}' is a trial's directory; give its adapter, {path}/adapter")
        yield FetchedAdapter(path, source, _left_out(names))
    elif path.is_file():
        if not zipfile.is_zipfile(path):
            raise AdapterError(
                f"'{path}' is no ZIP file and no directory; unpack it where you trust it, and give "
                "the directory that holds adapter_config.json"
            )
        with tempfile.TemporaryDirectory(prefix="rayfin-adapter-") as own:
            left = _unpack(path, Path(own))
            yield FetchedAdapter(Path(own), source, left)
    elif hub_id(source) == source:
        yield _from_hub(source)
    else:
        raise AdapterError(
            f"'{source}' is not there; give a directory with adapter_config.json, a ZIP file of "
            "one, or the id of an adapter on the Hugging Face hub, OWNER/NAME"
        )


def _left_out(names: list[str]) -> tuple[str, ...]:
    kept = set(adapter_files(names)) | {"rayfin.json"}
    return tuple(name for name in names if name not in kept)


# --- ZIP files ----------------------------------------------------------------------------------


def _unpack(path: Path, target: Path) -> tuple[str, ...]:
    """Unpack the adapter in a ZIP file to `target`; return the names of what is left out."""
    try:
        with path.open("rb") as file:
            _check_table(path, file)
            with zipfile.ZipFile(file) as archive:
                entries = _checked(path, archive.infolist())
                folder = _folder(path, entries)
                inside = {
                    name.removeprefix(folder): entry
                    for name, entry in entries.items()
                    if name.startswith(folder)
                }
                names = sorted(name for name in inside if "/" not in name)
                for name in [*adapter_files(names), *({"rayfin.json"} & set(names))]:
                    with archive.open(inside[name]) as packed, (target / name).open("xb") as out:
                        _copy(packed, out, inside[name].file_size, f"'{name}' in '{path}'")
    except _DAMAGED as error:
        raise AdapterError(
            f"'{path}' is not a whole ZIP file ({error}); make or copy it again"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"'{path}' can't be unpacked ({reason}); unpack it yourself") from error
    told = {name.partition("/")[0] for name in entries if not folder}
    told |= {name for name in entries if folder and not name.startswith(folder)}
    kept = {*adapter_files(names), "rayfin.json"}
    return tuple(sorted((told | set(names)) - kept))


def _check_table(path: Path, file: BinaryIO) -> None:
    """Raise AdapterError for a too large table of contents, all of which zipfile would hold."""
    size = file.seek(0, 2)
    start = max(0, size - 2**16 - 22)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise zipfile.BadZipFile("its end is missing")
    table = struct.unpack_from("<L", tail, at + 12)[0]
    if tail[at - 20 : at - 16] == _LOCATOR:
        file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
        end = file.read(56)
        if end[:4] != _END64 or len(end) < 56:
            raise zipfile.BadZipFile("its end is damaged")
        table = max(table if table != 0xFFFFFFFF else 0, struct.unpack_from("<Q", end, 40)[0])
    if table > MAX_TABLE_BYTES:
        raise AdapterError(
            f"'{path}' has a table of contents of {table} bytes, and at most {MAX_TABLE_BYTES} are "
            "read; pack the adapter's directory alone"
        )
    file.seek(0)


def _checked(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of all files by their normalised names.

    Raises AdapterError for an entry that leads out of the directory or is too large for its kind,
    and where all entries together are too large.
    """
    if len(entries) > MAX_ENTRIES:
        raise AdapterError(
            f"'{path}' has {len(entries)} entries; at most {MAX_ENTRIES} are read: pack the "
            "adapter's directory alone"
        )
    files: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name, mode = entry.filename, entry.external_attr >> 16
        normal = str(PurePosixPath(name))  # ./lora//x is lora/x
        parts = PurePosixPath(name).parts
        kind = stat.S_IFMT(mode)
        if not parts and name.startswith(".") and entry.is_dir():
            continue  # the top itself, as some programs pack it
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
            why = "leads out of it"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            why = "is a link or a device"
        elif entry.flag_bits & 1:
            why = "is encrypted"
        elif normal in files:
            why = "is there twice"
        else:
            if not entry.is_dir():
                files[normal] = entry
            if parts[-1] in READ_AS_JSON and entry.file_size > MAX_JSON_BYTES:
                raise AdapterError(
                    f"'{path}': the entry {name[:120]!r} would unpack to {entry.file_size} bytes; "
                    f"at most {MAX_JSON_BYTES} are read of such a file: restore it, and pack again"
                )
            continue
        raise AdapterError(
            f"'{path}': the entry {name[:120]!r} {why}, and nothing was unpacked; pack the files "
            "themselves, by relative names (zip -r adapter.zip DIR)"
        )
    announced = sum(entry.file_size for entry in entries)
    if announced > MAX_BYTES:
        raise AdapterError(
            f"'{path}' would unpack to {announced} bytes; at most {MAX_BYTES} are unpacked: pack "
            "the adapter's directory alone, or give that directory"
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if announced > free:
        raise AdapterError(
            f"'{path}' would unpack to {announced} bytes, and {tempfile.gettempdir()} has {free}; "
            "make room, or set TMPDIR to a directory that has it"
        )
    return files


def _folder(path: Path, files: Iterable[str]) -> str:
    """Return the adapter's directory in the ZIP file with a slash, or '' for the top."""
    names = [PurePosixPath(name) for name in files]
    for config in CONFIGS:
        found = sorted(
            (name.parent for name in names if name.name == config), key=lambda one: len(one.parts)
        )
        if not found:
            continue
        least = len(found[0].parts)
        if len([one for one in found if len(one.parts) == least]) > 1:
            raise AdapterError(
                f"'{path}' holds several adapters ({', '.join(map(str, found[:5]))}); "
                "pack one of them alone"
            )
        return f"{found[0]}/" if least else ""
    raise AdapterError(
        f"'{path}' holds neither adapter_config.json (an adapter) nor config.json (a full "
        "fine-tune); pack a directory that save_pretrained() wrote"
    )


def _copy(packed: Any, out: BinaryIO, announced: int, what: str) -> None:
    """Copy a file; raises AdapterError where it is longer than announced."""
    left = announced
    while block := packed.read(min(2**20, left + 1)):
        left -= len(block)
        if left < 0:
            raise AdapterError(f"{what} is longer than its table of contents says; pack it again")
        out.write(block)


# --- the hub ------------------------------------------------------------------------------------


def _from_hub(name: str) -> FetchedAdapter:
    """Return an adapter of the Hugging Face hub, downloaded or from the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download

    sizes: list[int] = []

    def look() -> None:
        info = HfApi().model_info(name, files_metadata=True, timeout=hub.SECONDS)
        files = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        sizes.append(sum(files[one] for one in adapter_files(list(files))))

    failure = hub.ask(look)
    if sizes and sizes[0] > MAX_BYTES:
        raise AdapterError(
            f"'{name}' on the hub has {sizes[0]} bytes; at most {MAX_BYTES} are downloaded: is it "
            "an adapter?"
        )
    # Everything but pickles and the files of other libraries.
    suffixes = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
    wanted: dict[str, Any] = {"repo_id": name, "allow_patterns": suffixes, "ignore_patterns": "*/*"}
    if failure is None:
        try:
            with no_progress_bars():
                found = Path(snapshot_download(**wanted))
            return _downloaded(name, found)
        # As in `hub.ask`: any error of the HTTP library's may come through.
        except Exception as error:  # noqa: BLE001
            failure = error
    try:
        found = Path(snapshot_download(**wanted, local_files_only=True))
    except (OSError, ValueError):
        reason = " ".join(str(failure).split())
        remedy = (
            hub.REMEDY
            if isinstance(failure, hub.HubUnreachable)
            else "check the name, accept the model's terms and set HF_TOKEN where it has any"
        )
        raise AdapterError(
            f"'{name}' is neither a directory or ZIP file here nor to be had from the Hugging Face "
            f"hub ({reason:.160}); {remedy}"
        ) from failure
    return _downloaded(name, found)


def _downloaded(name: str, snapshot: Path) -> FetchedAdapter:
    return FetchedAdapter(snapshot, f"hf:{name}@{snapshot.name}", ())
