"""The adapters' products in C beside torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.serving.engine import native
from rayfin.serving.engine.batch import SlotSpan
from rayfin.serving.engine.low_rank import LowRankKernel, blocks_of, kernel_for

CPU = torch.device("cpu")


def assert_adds_products(
    rounding: Any,
    out: torch.Tensor,
    before: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    groups: list[SlotSpan],
) -> None:
    exact = rounding.Inexact.of
    for group in groups:
        rank, tokens = int(ranks[group.slot]), slice(group.start, group.stop)
        low = exact(x[tokens]).times(exact(a[group.slot - 1, :rank].t()))
        low.times(exact(b[group.slot - 1, :rank]), onto=exact(before[tokens])).assert_holds(
            out[tokens]
        )


@pytest.mark.numeric
@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("features", "outputs"), [(16, 48), (67, 31), (576, 1536)])
def test_it_adds_each_slots_product(
    features: int, outputs: int, threads: int, variant: int, rounding: Any
) -> None:
    groups = [
        SlotSpan(1, 0, 1),
        SlotSpan(4, 1, 4),
        SlotSpan(2, 5, 14),
        SlotSpan(3, 14, 15),
        SlotSpan(1, 20, 90),
    ]
    ranks = torch.tensor([0, 8, 1, 0, 13], dtype=torch.int32)
    draw = torch.Generator().manual_seed(0)
    x, before = (torch.randn(90, n, generator=draw) for n in (features, outputs))
    a, b = (torch.randn(4, 16, n, generator=draw) for n in (features, outputs))
    out = before.clone()
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        LowRankKernel(variant).add(x, out, a, b, ranks, blocks_of(groups))
    finally:
        torch.set_num_threads(was)
    assert_adds_products(rounding, out, before, x, a, b, ranks, groups)
    assert torch.equal(out[4], before[4]) and torch.equal(out[14:20], before[14:20])


def test_it_uses_what_the_processor_has_and_torchs_threads() -> None:
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if " avx2 " in flags and " fma " in flags:
        assert LowRankKernel().variant > 0
    assert LowRankKernel(0).variant == 0
    assert LowRankKernel().parallel == (sys.platform == "linux")


@pytest.mark.numeric
def test_a_tokens_sum_is_the_same_in_any_company() -> None:
    draw = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=draw) for shape in ((7, 64), (2, 8, 64), (2, 8, 32)))
    ranks = torch.tensor([0, 8, 6], dtype=torch.int32)
    together, alone = torch.zeros(7, 32), torch.zeros(7, 32)
    kernel = LowRankKernel()
    kernel.add(x, together, a, b, ranks, blocks_of([SlotSpan(1, 0, 5), SlotSpan(2, 5, 7)]))
    for token in range(7):
        slot = 1 if token < 5 else 2
        kernel.add(x, alone, a, b, ranks, blocks_of([SlotSpan(slot, token, token + 1)]))
    assert torch.equal(together, alone)


@pytest.mark.numeric
def test_views_with_wider_rows(rounding: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    wide, outs = torch.randn(3, 40, generator=draw), torch.zeros(3, 50)
    a, b = torch.randn(1, 8, 16, generator=draw), torch.randn(1, 8, 20, generator=draw)
    ranks, groups = torch.tensor([0, 8], dtype=torch.int32), [SlotSpan(1, 0, 3)]
    LowRankKernel().add(wide[:, 8:24], outs[:, 10:30], a, b, ranks, blocks_of(groups))
    x, given, nothing = wide[:, 8:24], outs[:, 10:30], torch.zeros(3, 20)
    assert_adds_products(rounding, given, nothing, x, a, b, ranks, groups)
    assert not outs[:, :10].any() and not outs[:, 30:].any()


def test_no_number_stays_no_number_and_in_its_row() -> None:
    x, out = torch.ones(2, 16), torch.zeros(2, 8)
    x[0, 3] = float("nan")
    ranks = torch.tensor([0, 4], dtype=torch.int32)
    a, b = torch.ones(1, 8, 16), torch.ones(1, 8, 8)
    LowRankKernel().add(x, out, a, b, ranks, blocks_of([SlotSpan(1, 0, 2)]))
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.full((8,), 64.0))


def test_small_numbers_are_not_flushed_by_loading_it() -> None:
    LowRankKernel()
    assert float(torch.tensor([1e-40]) * torch.tensor([0.5])) > 0.0


def test_only_for_floats_on_cpu() -> None:
    assert isinstance(kernel_for(CPU, torch.float32), LowRankKernel)
    assert kernel_for(CPU, torch.bfloat16) is None
    assert kernel_for(torch.device("cuda"), torch.float32) is None


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its own cache, and nothing loaded before."""
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    return tmp_path


def test_what_others_can_write_is_not_loaded(anew: Path) -> None:
    LowRankKernel()
    (library,) = anew.rglob("*.so")
    library.unlink()  # its code is mapped: what is written into the same file ends the process
    library.write_bytes(b"not what was compiled")
    library.chmod(0o666)
    assert isinstance(kernel_for(CPU, torch.float32), LowRankKernel)
    assert library.read_bytes() == b"not what was compiled"


def test_without_a_cache_it_is_compiled_for_the_process(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFIN_CACHE", "/proc/nowhere")
    assert isinstance(kernel_for(CPU, torch.float32), LowRankKernel)
    assert not list(anew.iterdir())


def test_other_flags_make_another_library(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LowRankKernel()
    monkeypatch.setenv("RAYFIN_CFLAGS", "-O2 -ffp-contract=off")
    LowRankKernel()
    assert len(list(anew.rglob("*.so"))) == 2


@pytest.mark.parametrize("flags", ["-no-such-flag", "-O2 '"])
def test_flags_that_no_compiler_takes_are_named(
    flags: str, anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("RAYFIN_CFLAGS", flags)
    assert kernel_for(CPU, torch.float32) is None
    assert "no-such-flag" in caplog.text or "RAYFIN_CFLAGS" in caplog.text


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "ccache no-such"])
def test_without_a_compiler_torch_does_it(
    compiler: str, anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert kernel_for(CPU, torch.float32) is None
    assert "slower" in caplog.text
    assert not list(anew.rglob("*.so*"))


def test_many_processes_may_compile_it_at_once(tmp_path: Path) -> None:
    code = "from rayfin.serving.engine.low_rank import LowRankKernel; LowRankKernel()"
    own = os.environ | {"RAYFIN_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=own) for _ in range(3)]
    assert [process.wait(540) for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.rglob("*"))) == 2, "its folder, and one library"
