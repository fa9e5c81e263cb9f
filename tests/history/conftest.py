"""One history on each database: SQLite in a file, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rayfin.history import History, TrialRecord

PASSWORD = "open sesame/@%"  # characters that a URL must quote
START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class Server:
    """A PostgreSQL server on loopback; every `database()` is a fresh one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._count = 0

    def url(self, database: str, password: str = PASSWORD) -> str:
        from urllib.parse import quote

        secret = quote(password, safe="")
        return f"postgresql+psycopg://rayfin:{secret}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        self._count += 1
        name = f"test_{self._count}"
        self._run(f'CREATE DATABASE "{name}"')
        return name

    def drop(self, name: str) -> None:
        self._run(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "dbname": "postgres"}
        login = {"user": "rayfin", "password": PASSWORD}
        with psycopg.connect(**where, **login, autocommit=True) as connection:
            connection.execute(statement)


def _programs() -> Path | None:
    """The newest PostgreSQL's programs; Debian keeps them off PATH."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = sorted(debian, key=lambda path: int(path.parts[-3])) or [
        Path(path) for path in [shutil.which("initdb")] if path
    ]
    return found[-1].resolve().parent if found else None


def _unprivileged() -> dict[str, Any]:
    """Options of subprocess.run: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            account = pwd.getpwnam(name)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    pytest.importorskip(
        "psycopg", reason="psycopg is not installed: pip install 'rayfin[postgres]'"
    )
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    account = _unprivileged()
    # Not tmp_path: another user must reach it, and a socket's path is at most 107 characters long.
    folder = Path(tempfile.mkdtemp(prefix="rayfin-pg-"))
    data, secret, log = folder / "data", folder / "password", folder / "log"

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command, cwd=folder, text=True, check=False, timeout=540, **account,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}" + (
            log.read_text() if log.exists() else ""
        )

    try:
        secret.write_text(PASSWORD)
        if account:
            for path in (folder, secret):
                os.chown(path, account["user"], account["group"])
        run(
            "initdb", "-D", str(data), "-U", "rayfin", "-A", "scram-sha-256",
            f"--pwfile={secret}", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip
        port = _free_port()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run(
            "pg_ctl", "-D", str(data), "-w", "-l", str(log),
            "-o", f"{options} -c fsync=off", "start",
        )  # fmt: skip
        try:
            yield Server(port)
        finally:
            run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(server: Server) -> Iterator[str]:
    name = server.database()
    yield server.url(name)
    server.drop(name)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where no history is yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'history.sqlite'}"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
def history(url: str) -> Iterator[History]:
    with History.open(url) as opened:
        yield opened


@pytest.fixture
def record() -> Callable[..., TrialRecord]:
    """A finished trial; `n` numbers it and sets its time, the rest replaces fields."""

    def make(n: int = 1, **changes: Any) -> TrialRecord:
        at = START + timedelta(minutes=n)
        values: dict[str, Any] = {
            "trial_id": f"trial-{n:03}",
            "sweep_id": "sweep-a",
            "fingerprint": f"f{n}",
            "status": "finished",
            "created_at": at,
            "updated_at": at,
            "spec": {"method": {"type": "lora", "r": 8}, "train": {"learning_rate": 2e-4}},
            "scenario": {"hardware": {"device": "cpu"}},
            "metrics": {"eval_loss": 1.0 + n / 100, "exact_match": 0.5, "train_seconds": 7.25},
            "curve": [{"step": 10, "loss": 2.5}, {"step": 20, "eval_loss": 1.0}],
            "versions": {"torch": "2.13.0"},
            "directory": f"trials/{n}",
        }
        return TrialRecord(**(values | changes))

    return make
