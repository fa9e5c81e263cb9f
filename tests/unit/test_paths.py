"""What rayfin writes, and who may read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from rayfin.paths import write_directory_whole, write_text


def test_what_is_written_has_the_users_mask_which_no_thread_sees_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(mask: int) -> NoReturn:
        raise AssertionError(f"meanwhile all threads write by the mask {mask:03o}")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", changed)
            write_text(tmp_path / "report.html", "all of it")
            with write_directory_whole(tmp_path / "adapter") as temporary:
                (temporary / "weights").touch()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"report.html": 0o640, "adapter": 0o750, "weights": 0o640}
