"""Sweeps whose storage is a bucket, from machines that see no common disk."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rayfin.paths import Place

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 100


def test_a_sweep_goes_on_from_the_bucket_on_another_machine(
    lab: Any, s3: dict[str, str], bucket: str, moment: random.Random
) -> None:
    command = (
        "sweep", "sweep.parameters.method.r=[4,8]", "sweep.search=grid", "sweep.num_samples=2",
        "sweep.scheduler=none", f"train.max_steps={STEPS}", f"train.eval_steps={STEPS // 10}",
        "train.per_device_train_batch_size=2", *lab.in_bucket(bucket),
    )  # fmt: skip
    lab.environment |= s3 | lab.disk("one")
    driver = lab.rayfin(*command)
    interrupted = driver.amid(finished=1, step=moment.randrange(1, STEPS * 8 // 10))
    assert driver.interrupt() == 130, driver.err
    (done,) = (row for row in lab.rows() if row.status == "finished")
    mark = lab.mark(interrupted)

    lab.environment |= lab.disk("another")
    registry = lab.root / "registry"
    publish = ("publish.name=best", f"publish.storage={registry}", "sweep.report_samples=1")
    driver = lab.rayfin(*command, *publish, "--resume")
    assert driver.end() == 0, driver.err
    assert lab.rows()[0] == done, "a finished trial was touched"
    both = lab.rows()
    assert [row.status for row in both] == ["finished"] * 2
    assert lab.losses(both[1])[0] == mark, "it started anew, and not from its checkpoint"
    for row in both:
        place = Place.at(row.directory)
        assert str(place).startswith(f"{bucket}/sweeps/") and (place / "adapter").exists()
        assert not lab.checkpoints(row)
    report = Place.at(bucket) / "sweeps" / both[0].sweep_id / "report.html"
    assert str(report) in driver.out and report.fetch_file()
    assert all(row.trial_id in report.path.read_text() for row in both)
    assert (registry / "adapters" / "best" / "1" / "adapter_config.json").is_file()
    assert not list(lab.root.glob("another/objects/**/*.safetensors")), "copies are let go"
