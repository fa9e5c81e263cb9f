"""What is not a usable history is refused in one line that names the remedy and no password."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from rayfin.errors import HistoryError
from rayfin.history import History


def refused(url: str, *, create: bool = True) -> str:
    with pytest.raises(HistoryError) as caught:
        History.open(url, create=create)
    message = str(caught.value)
    assert message.startswith("history: ")
    assert "\n" not in message
    return message


def rewrite(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("runs/history.sqlite", "write sqlite:///PATH or postgresql+psycopg://"),
        ("", "is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////no/such/place/h.sqlite", "make '/no/such/place' first"),
        ("sqlite:////proc/h.sqlite", "a directory that you may write to"),
        ("sqlite:////dev/null/h.sqlite", "dev/null"),
        ("sqlite:////tmp", "is not a file"),
        ("mysql://u:secret@host/db", "'mysql://u:***@host/db' is not supported (mysql)"),
        ("postgresql+asyncpg://u:secret@host/db", "(postgresql+asyncpg)"),
        (
            "postgresql://u:se@cret@host:port/db",
            "'postgresql://u:***@host:port/db' is not a valid URL",
        ),
    ],
)
def test_a_bad_url_is_refused(url, part):
    message = refused(url)
    assert part in message
    assert "cret" not in message


def test_reading_makes_nothing(tmp_path):
    path = tmp_path / "history.sqlite"
    assert "does not exist; run a trial first" in refused(f"sqlite:///{path}", create=False)
    assert list(tmp_path.iterdir()) == []
    path.touch()
    assert "holds no rayfin history yet" in refused(f"sqlite:///{path}", create=False)


@pytest.mark.parametrize("name", ["with space", "50% #1?", "目录", "a@b:c"])
def test_any_directory_name_will_do(tmp_path, record, name):
    (tmp_path / name).mkdir()
    with History.open(f"sqlite:///{tmp_path / name / 'h.sqlite'}") as history:
        history.put(record())
    assert (tmp_path / name / "h.sqlite").is_file()


def test_an_empty_file_becomes_a_history(tmp_path, record):
    (tmp_path / "h.sqlite").touch()
    with History.open(f"sqlite:///{tmp_path / 'h.sqlite'}") as history:
        history.put(record())


def test_wal_is_on(tmp_path):
    path = tmp_path / "h.sqlite"
    History.open(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("junk", [b"not a database at all, but long enough" * 50, b"x"])
def test_a_file_that_is_no_database_is_refused(tmp_path, junk):
    path = tmp_path / "h.sqlite"
    path.write_bytes(junk)
    assert "is no SQLite database, or is damaged" in refused(f"sqlite:///{path}")
    assert path.read_bytes() == junk


def test_a_damaged_history_is_an_error(tmp_path, record):
    path = tmp_path / "h.sqlite"
    with History.open(f"sqlite:///{path}") as history:
        for n in range(50):
            history.put(record(n))
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(HistoryError, match="damaged"), History.open(f"sqlite:///{path}") as history:
        history.trials()


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "h.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE studies (id INTEGER)")
    assert "is not a rayfin history (it has other tables: studies)" in refused(f"sqlite:///{path}")


@pytest.mark.postgres
def test_a_team_database_may_hold_other_things(postgres_url, record):
    rewrite(postgres_url, "CREATE TABLE studies (id INTEGER)")
    with History.open(postgres_url) as history:
        history.put(record())


def test_a_newer_history_asks_for_an_upgrade(history, url):
    rewrite(url, "UPDATE rayfin_meta SET value = '99' WHERE key = 'schema_version'")
    assert "has schema version 99, this rayfin knows up to 1; upgrade rayfin" in refused(url)


def test_a_history_without_version_is_refused(history, url):
    rewrite(url, "DELETE FROM rayfin_meta")
    assert "is not a rayfin history (its schema version is None)" in refused(url)


def test_a_row_that_another_program_broke_is_an_error(history, url, record):
    history.put(record())
    rewrite(url, "UPDATE rayfin_trials SET status = 'lost'")
    with pytest.raises(HistoryError, match="trial 'trial-001' is not a trial record: status"):
        history.trials()


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """As somebody who may not write to `folder`: root may write everywhere."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_directory_is_an_error(record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "h.sqlite"
        with History.open(f"sqlite:///{path}") as history:
            history.put(record())
        with unprivileged(Path(folder)):
            new = refused(f"sqlite:///{folder}/new.sqlite")
            held = refused(f"sqlite:///{path}")
    assert "a directory that you may write to" in new
    assert "a directory that you may write to" in held


def test_an_unreachable_server_is_known_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        message = refused(f"postgresql+psycopg://ann:secret@127.0.0.1:{port}/db")
    assert f"'postgresql+psycopg://ann:***@127.0.0.1:{port}/db' can't be used" in message
    assert "check that the server runs" in message
    assert "secret" not in message


def test_a_silent_server_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        message = refused(f"postgresql://ann@127.0.0.1:{port}/db?password=secret")
    assert "timeout" in message
    assert "secret" not in message


@pytest.mark.postgres
def test_a_wrong_password_is_not_shown(server):
    message = refused(server.url("postgres", password="let me in"))
    assert "password authentication failed" in message
    assert "let me in" not in message
    assert "let%20me%20in" not in message
    assert 'database "absent" does not exist' in refused(server.url("absent"))


def test_a_password_is_nowhere_in_the_repr(history, record):
    history.put(record())
    assert "sesame" not in repr(history) + history.shown_url


def test_a_missing_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = refused("postgresql+psycopg://ann:secret@127.0.0.1/db")
    assert "pip install 'rayfin[postgres]'" in message
    assert "secret" not in message


def test_importing_it_is_light():
    heavy = ("torch", "ray", "sqlite3", "psycopg", "pyarrow", "pandas", "transformers")
    code = f"import sys, rayfin.history; print([m for m in {heavy} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
