"""Probes whose process is killed: the same command pays for none of them twice."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_killed_command_pays_for_no_probe_twice(lab: Any) -> None:
    asked = ("train.max_steps=200", "--probe", "3")
    killed = lab.rayfin("recommend", *asked)

    def second_runs() -> Any:
        rows = lab.rows()
        return rows if len(rows) == 2 and rows[0].status == "stopped" else None

    first, _ = killed.until(second_runs)
    killed.kill()

    again = lab.rayfin("recommend", *asked)
    assert again.end() == 0, again.err
    rows = lab.rows()
    assert rows[0] == first and len(rows) == 3
    assert {row.status for row in rows} == {"stopped"}
    assert {row.metrics["steps"] for row in rows} == {20}
    assert again.err.count("from the history") == 1
