"""Connect to the database of a history by its URL, or raise one clear error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from rayfin.errors import HistoryError
from rayfin.history.tables import META, SCHEMA_VERSION, TRIALS, metadata
from rayfin.redaction import is_secret, redact, redact_url

BUSY_SECONDS = 30
# psycopg applies it to each address of a host; an unreachable one should be known within 5 s.
CONNECT_SECONDS = 4
# Any number will do, as long as every rayfin uses the same one.
_ADVISORY_LOCK = 7_215_366

_FORMS = "sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE"


def parse_url(url: str) -> URL:
    """Parse the URL of a history; raises HistoryError for an unsupported or malformed URL."""
    scheme, separator, rest = url.partition("://")
    given = redact_url(url)
    if not separator:
        raise HistoryError(
            f"history: '{given}' is not a URL; write {_FORMS} (sqlite:///{given} for a file)"
        )
    if scheme == "sqlite":
        # All of it is the path: make_url would cut a directory's name at a question mark.
        path = rest.removeprefix("/")
        if not rest.startswith("/") or path in ("", ":memory:"):
            raise HistoryError(f"history: '{given}' names no file; write sqlite:///PATH")
        return URL.create("sqlite", database=str(Path(path).expanduser().absolute()))
    if scheme not in ("postgresql", "postgresql+psycopg", "postgres"):
        raise HistoryError(f"history: '{given}' is not supported ({scheme}); write {_FORMS}")
    place, _, options = rest.partition("?")
    try:
        # Else a part of the password would be taken for the host.
        if place.count("@") > 1 or not all("=" in one for one in options.split("&") if one):
            raise ValueError("a password that is not encoded")
        return make_url(f"postgresql+psycopg://{rest}")
    except (ArgumentError, ValueError):
        raise HistoryError(
            f"history: '{given}' is not a valid URL; write {_FORMS}; in a password, @ : / ? are "
            "%40 %3A %2F %3F"
        ) from None


def shown_url(url: URL) -> str:
    """Return the URL without its password, to be shown."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database}"
    return redact_url(url.render_as_string(hide_password=False))


def without_password(url: str) -> str:
    """Return the URL of a history in a form to be saved in a file that is read from any directory.

    It has no password, which libpq takes from elsewhere, and an absolute path for SQLite.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return shown_url(parsed)
    query = {name: v for name, v in parsed.query.items() if not is_secret(name, str(v))}
    # Not parsed.set(password=None), which leaves it as it is.
    place = (parsed.host, parsed.port, parsed.database)
    plain = URL.create(parsed.drivername, parsed.username, None, *place, query=query)
    return plain.render_as_string(hide_password=False)


def connect(url: URL, *, create: bool) -> Engine:
    """Return an engine on the history at `url`; raises HistoryError.

    With `create`, a missing history is created.
    """
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        _check_file(Path(str(url.database)), url, create=create)
    engine = _sqlite_engine(url) if sqlite else _postgresql_engine(url)
    try:
        with database_errors(url):
            _ensure_schema(engine, url, create=create)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turn the database's errors into a HistoryError that names the history and the remedy."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        options = (str(v) for name, v in url.query.items() if is_secret(name, str(v)))
        secrets = (str(url.password or ""), *options)
        message = redact(" ".join(str(cause).split()), secrets)
        raise HistoryError(
            f"history: '{shown_url(url)}' can't be used: {message}; {_remedy(url, message)}"
        ) from None


def lock_writers(connection: Connection) -> None:
    """Lock out all other writers until the transaction ends; SQLite does so when it begins."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


def writing(engine: Engine) -> Engine:
    """Return the engine with transactions that take SQLite's write lock when they begin."""
    return engine.execution_options(rayfin_write=True)


def _check_file(path: Path, url: URL, *, create: bool) -> None:
    try:
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(16)
            # SQLite takes a file of a few bytes for an empty one, and would write over it.
            if start and start != b"SQLite format 3\x00":
                raise _not_a_history(url, "the file is no SQLite database, or is damaged")
            return
        if path.exists():
            raise HistoryError(
                f"history: '{shown_url(url)}' is not a file; give the path of a file"
            )
        if not create:
            raise HistoryError(
                f"history: '{shown_url(url)}' does not exist; run a trial first, "
                "or name the right one with storage=DIR or history=URL"
            )
        if not path.parent.is_dir():
            raise HistoryError(
                f"history: '{shown_url(url)}' can't be made, its directory does not exist; "
                f"make '{path.parent}' first"
            )
    except OSError as error:
        raise HistoryError(
            f"history: '{shown_url(url)}' can't be read ({error.strerror})"
        ) from error


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own transactions begin late and upgrade their lock, which can fail at once
        # with "database is locked"; ours begin where SQLAlchemy says so.
        connection.isolation_level = None
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("rayfin_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _use_wal(connection: Any) -> None:
    import sqlite3

    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # SQLite does not wait here: another process opening the same new file has it.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql_engine(url: URL) -> Engine:
    options = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}
    try:
        return create_engine(url, connect_args=options, pool_pre_ping=True)
    except ImportError as error:
        raise HistoryError(
            f"history: '{shown_url(url)}' needs psycopg, which can't be imported ({error}); "
            "pip install 'rayfin[postgres]'"
        ) from None


def _ensure_schema(engine: Engine, url: URL, *, create: bool) -> None:
    with engine.connect() as connection:
        if _holds_history(connection, url):
            return
    if not create:
        raise HistoryError(
            f"history: '{shown_url(url)}' holds no rayfin history yet; "
            "run a trial first, or name another"
        )
    with writing(engine).begin() as connection:
        lock_writers(connection)
        if not _holds_history(connection, url):
            metadata.create_all(connection)
            connection.execute(
                META.insert().values(key="schema_version", value=str(SCHEMA_VERSION))
            )


def _holds_history(connection: Connection, url: URL) -> bool:
    """Whether the tables exist; raises HistoryError for tables of an unknown version."""
    tables = inspect(connection).get_table_names()
    if META.name not in tables:
        # A file belongs to one program; a PostgreSQL database may be shared.
        if TRIALS.name in tables or (tables and connection.dialect.name == "sqlite"):
            raise _not_a_history(url, f"it has other tables: {', '.join(sorted(tables)[:5])}")
        return False
    version = connection.scalar(select(META.c.value).where(META.c.key == "schema_version"))
    if version is None or not str(version).isdigit():
        raise _not_a_history(url, f"its schema version is {version!r}")
    if int(version) > SCHEMA_VERSION:
        raise HistoryError(
            f"history: '{shown_url(url)}' has schema version {version}, this rayfin knows up to "
            f"{SCHEMA_VERSION}; upgrade rayfin, or name another history"
        )
    return True


def _not_a_history(url: URL, why: str) -> HistoryError:
    return HistoryError(
        f"history: '{shown_url(url)}' is not a rayfin history ({why}); name another"
    )


def _remedy(url: URL, message: str) -> str:
    if url.get_backend_name() == "postgresql":
        return "check that the server runs, and the host, user, password and database of the URL"
    if "locked" in message:
        return f"another process has held it for {BUSY_SECONDS} s: end that one, or try again"
    if "malformed" in message or "not a database" in message:
        return "the file is damaged or not a history: restore a copy or an export, or name another"
    return "give a file in a directory that you may write to"
