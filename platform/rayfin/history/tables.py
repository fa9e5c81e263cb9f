"""The tables of a history: one row per trial, and the version of the schema."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import JSON, Column, DateTime, Dialect, MetaData, String, Table, Text, TypeDecorator

SCHEMA_VERSION = 1


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC, also on SQLite, which has no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Byte order, so that rows come in the same order from every database.
_ID = String().with_variant(String(collation="C"), "postgresql")

metadata = MetaData()

# The prefix lets a team keep the history in a PostgreSQL database that holds other things too.
META = Table(
    "rayfin_meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)

# JSON, not JSONB: it gives back exactly the text that went in (1e16 stays a float).
TRIALS = Table(
    "rayfin_trials",
    metadata,
    Column("trial_id", _ID, primary_key=True),
    Column("sweep_id", _ID, nullable=False, index=True),
    Column("fingerprint", _ID, nullable=False, index=True),
    Column("status", String, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, index=True),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("scenario", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("curve", JSON, nullable=False),
    Column("error", Text),
    Column("versions", JSON, nullable=False),
    Column("directory", Text),
)
