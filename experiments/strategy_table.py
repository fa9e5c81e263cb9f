#!/usr/bin/env python
"""Runs every strategy with every method, and writes what was seen: docs/distributed.md's table.

    python experiments/strategy_table.py            # two processes on this machine's CPUs
    python experiments/strategy_table.py --device cuda --workers 2
    python experiments/strategy_table.py --model smollm2-135m --methods lora full   # only prints

Each trial is 20 steps of the tiny model. Verified is one whose losses are those of one process, to
1e-3, and whose adapter, loaded by plain PEFT on a base of its own, scores the recorded loss. Writes
platform/rayfin/training/verified.json, from which scaling.strategy=auto chooses, and the table
between the marks in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERIFIED = ROOT / "platform/rayfin/training/verified.json"
DOCUMENT = ROOT / "docs/distributed.md"
MARKS = ("<!-- strategies: begin -->", "<!-- strategies: end -->")
TOLERANCE = 1e-3
SECONDS = 1200.0
# Without dropout, which each worker draws for itself.
SETTINGS = [
    "data.max_samples=120",
    "data.max_length=128",
    "train.max_steps=20",
    "train.eval_steps=10",
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
]
QUANTIZED = {"qlora, 8-bit": ("qlora", 8)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="tiny", help="any but the tiny one is only printed")
    parser.add_argument("--methods", nargs="+", help="some methods only, and only printed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(json.loads(args.worker))
    if args.score is not None:
        print(score(json.loads(args.score)))
        return 0

    from rayfin.methods import METHODS
    from rayfin.training.strategies import STRATEGIES

    rows = {name: (name, None) for name in METHODS} | QUANTIZED
    if args.methods is not None:
        rows = {name: rows[name] for name in args.methods}
    cells: dict[str, dict[str, str]] = {}
    for row, (method, bits) in rows.items():
        settings = [*SETTINGS, f"model.name={args.model}", f"method.type={method}"]
        settings += [f"method.quantization_bit={bits}"] if bits else []
        settings += ["method.init_r=6", "method.target_r=3"] if method == "adalora" else []
        alone = losses(settings, "ddp", 1, args.device)
        cells[row] = {}
        for strategy in STRATEGIES:
            cells[row][strategy], off = seen(settings, strategy, args, alone)
            by = f", off by {off:.1e}" if off is not None else ""
            print(f"{row:14} {strategy:16} {cells[row][strategy]}{by}", flush=True)
    if args.model == "tiny" and args.methods is None:
        write(cells, args.device)
    failed = [f"{r} {s}" for r, row in cells.items() for s, cell in row.items() if "FAILED" in cell]
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "none failed")
    return 1 if failed else 0


def seen(
    settings: list[str], strategy: Any, args: argparse.Namespace, alone: list[float]
) -> tuple[str, float | None]:
    """What the table says, and by how much the losses differ at most."""
    from rayfin.config import load_config
    from rayfin.training.strategies import refusal

    if (why := refusal(strategy, load_config(None, settings).method)) is not None:
        return f"refused: {why}", None
    try:
        found = losses(settings, strategy, args.workers, args.device)
    except RuntimeError as error:
        return f"FAILED: {error}", None
    off = max(abs(a - b) / b for a, b in zip(found, alone, strict=True))
    return "verified" if off <= TOLERANCE else "FAILED: other losses", off


def losses(settings: list[str], strategy: str, workers: int, device: str) -> list[float]:
    """Of every step; raises RuntimeError where the trial, a process of it or its adapter fails."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as directory:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        job = {
            "settings": settings,
            "strategy": strategy,
            "workers": workers,
            "device": device,
            "directory": directory,
        }
        command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(job)]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": workers}
        place |= {"LOCAL_WORLD_SIZE": workers, "OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "PASSIVE"}
        processes = [
            subprocess.Popen(
                command,
                env=os.environ
                | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(workers)
        ]
        try:
            said = [process.communicate(timeout=SECONDS)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        answer = Path(directory) / "answer.json"
        if not answer.exists():
            raise RuntimeError(said[0].strip().rpartition("\n")[2][:200])
        result = json.loads(answer.read_text())
        if result["status"] != "finished":
            raise RuntimeError(result["error"])
        recorded = result["metrics"]["eval_loss"]
        job |= {"adapter": result["adapter"]}
        command = [sys.executable, "-W", "ignore", __file__, "--score", json.dumps(job)]
        scoring = subprocess.run(command, check=False, capture_output=True, text=True)
        if scoring.returncode:
            raise RuntimeError(scoring.stderr.strip().rpartition("\n")[2][:200])
        scored = float(scoring.stdout)
        if abs(scored - recorded) > TOLERANCE * recorded:
            raise RuntimeError(f"its adapter scores {scored:.4f} in PEFT, recorded {recorded:.4f}")
        return [point["loss"] for point in result["curve"] if "loss" in point]


def work(job: dict[str, Any]) -> int:
    """One worker."""
    import torch
    import torch.distributed as dist

    from rayfin.config import load_config
    from rayfin.hardware import describe_hardware
    from rayfin.paths import StoragePath
    from rayfin.training import TrialSpec
    from rayfin.training.strategies import WorkerLayout
    from rayfin.training.trial import run_trial

    on_gpu = job["device"] == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if job["workers"] > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    directory = Path(job["directory"])
    result = run_trial(
        TrialSpec.of(load_config(None, job["settings"])),
        lambda _: None,
        location=StoragePath(directory),
        hardware=describe_hardware(on_gpu),
        group=WorkerLayout(job["workers"], job["strategy"]),
    )
    if os.environ["RANK"] == "0":
        (directory / "answer.json").write_text(json.dumps(result.as_dict()))
    return 0


def score(job: dict[str, Any]) -> float:
    """The mean loss over the held-out labels, one sample at a time, of plain PEFT or Transformers.

    On a CPU, whatever trained it.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rayfin.config import load_config
    from rayfin.models import load_base
    from rayfin.training import TrialSpec
    from rayfin.training.trial_cache import TrialCache

    spec = TrialSpec.of(load_config(None, job["settings"]))
    model: torch.nn.Module
    if spec.method.type == "full":
        model = AutoModelForCausalLM.from_pretrained(job["adapter"])
    else:
        base = load_base(spec.model, spec.method.quantization_bit, "cpu")
        model = PeftModel.from_pretrained(base, job["adapter"])
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in TrialCache().tokenized(spec).eval:
            ids, labels = (torch.tensor(sample[key]) for key in ("input_ids", "labels"))
            mask = torch.ones(1, len(ids), dtype=torch.long)
            logits = model.eval()(input_ids=ids[None], attention_mask=mask).logits[0, -len(ids) :]
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            )
            count += int((labels[1:] != -100).sum())
    return total / count


def write(cells: dict[str, dict[str, str]], device: str) -> None:
    from importlib.metadata import version

    from rayfin.paths import write_json, write_text
    from rayfin.training.strategies import STRATEGIES

    known = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {}
    found = {
        strategy: [row for row, row_cells in cells.items() if row_cells[strategy] == "verified"]
        for strategy in STRATEGIES
    }
    verified = known.get("verified", {}) | {device: found}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    versions = known.get("versions", {}) | {device: packages}
    write_json(VERIFIED, {"verified": verified, "versions": versions})

    reasons: list[str] = []

    def shown(row: str, strategy: str) -> str:
        on = [
            where
            for where, key in (("CPU", "cpu"), ("GPU", "cuda"))
            if row in verified.get(key, {}).get(strategy, ())
        ]
        if on:
            return " + ".join(on)
        told = cells[row][strategy]
        if told not in reasons:
            reasons.append(told)
        kind, _, _ = told.partition(":")
        return f"{kind.lower()} ({reasons.index(told) + 1})"

    lines = [
        f"| method | {' | '.join(STRATEGIES)} |",
        f"|---|{'---|' * len(STRATEGIES)}",
        *(
            f"| {row} | {' | '.join(shown(row, strategy) for strategy in STRATEGIES)} |"
            for row in cells
        ),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        "",
        f"Seen with {', '.join(f'{name} {it}' for name, it in packages.items())}.",
    ]
    begin, end = MARKS
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    write_text(DOCUMENT, before + begin + "\n" + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    sys.exit(main())
