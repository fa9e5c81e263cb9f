"""What a failed test leaves is ended, and within bounds: else the next ones fail of it, too."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import pytest

# A driver with a process of its own, which has the driver's output, too.
FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "child"])
time.sleep(600)
"""


@pytest.mark.parametrize("where", ["here", "on a machine"])
def test_closing_a_laboratory_ends_drivers_and_what_they_started(
    where: str, network: Any, lab: Any
) -> None:
    if where == "on a machine":
        lab.enter = network.add("machine").enter
    driver = lab.program(FAMILY)

    def family() -> list[psutil.Process]:
        return psutil.Process(driver.process.pid).children(recursive=True)

    def last() -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):  # it is becoming another program
            return next((one for one in family() if one.cmdline()[-1:] == ["child"]), None)
        return None

    child = driver.until(last)
    started = [psutil.Process(driver.process.pid), *family()]
    assert child in started
    lab.close()
    assert driver.process.returncode is not None
    assert not any(lab.runs(one) for one in started)


def test_a_machine_on_which_ray_does_not_start_is_ended_and_another_takes_its_place(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, asked = network.add("head"), network.add("machine")
    tried: list[Any] = []

    def start(self: Any, of: Any, **_: str) -> None:
        assert of is head
        tried.append(self)
        if len(tried) < 3:
            raise RuntimeError("the raylet has ended")

    monkeypatch.setattr(type(asked), "start_ray", start)
    started = network.start_ray(asked, head)
    first, second, third = tried
    assert first is asked and started is third
    assert [node.lives for node in tried] == [False, False, True]
    assert len({node.address for node in tried}) == 3 and third.name == asked.name
    assert {head, third} <= set(network.living) and not {first, second} & set(network.living)


def test_ray_that_never_starts_is_an_error_with_what_each_machine_said(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, asked = network.add("head"), network.add("machine")
    before = [node for node in network.living if node is not asked]

    def start(*_: Any, **__: str) -> None:
        raise RuntimeError("the raylet has ended")

    monkeypatch.setattr(type(asked), "start_ray", start)
    with pytest.raises(RuntimeError, match=r"(the raylet has ended\n){3}the raylet has ended"):
        network.start_ray(asked, head)
    assert network.living == before


def test_a_process_that_says_nothing_is_waited_for_within_a_bound(network: Any, lab: Any) -> None:
    process = network.add("machine").python("-c", "print('a'); import time; time.sleep(600)")
    lines = lab.lines(process)
    assert lines.next() == "a\n"
    with pytest.raises(TimeoutError):
        lines.next(bound=0.1)
    lab.end_family(process)
    assert lines.next() == ""
