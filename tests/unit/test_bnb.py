"""bitsandbytes is imported without the compiler, and torch keeps its own."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, threading, torch
from rayfin.models import import_bitsandbytes
compiler = torch.compile
threads = [threading.Thread(target=import_bitsandbytes) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert torch.compile is compiler
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
weight = torch.randn(64, 64)
back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
assert (back - weight).norm() / weight.norm() < 0.2
"""

WITHOUT = """
import importlib.util
found = importlib.util.find_spec
def without(name, *rest):
    return None if name == "bitsandbytes" else found(name, *rest)
importlib.util.find_spec = without
from rayfin.models import import_bitsandbytes
import_bitsandbytes()
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_many_threads_import_it_once_and_nothing_stays_replaced() -> None:
    run(CODE)


def test_a_machine_without_it_is_left_alone() -> None:
    run(WITHOUT)
