"""The trial history: every trial that ever ran, in SQLite or PostgreSQL."""

from rayfin.history.record import SERVING, TrialRecord, now
from rayfin.history.store import History, SweepSummary
from rayfin.history.transfer import ImportReport, export_history, import_history

__all__ = [
    "SERVING",
    "History",
    "ImportReport",
    "SweepSummary",
    "TrialRecord",
    "export_history",
    "import_history",
    "now",
]
