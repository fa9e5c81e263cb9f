#!/usr/bin/env python
"""Asks the advisor for many scenarios, and writes docs/recommendations.md.

    python experiments/recommendations_table.py           # writes the table
    python experiments/recommendations_table.py --print   # prints it, with all choices

It asks as somebody does who has no history: what is known are the references that come with
rayfin. No file of a model or data is read and no network used. The machines are described here,
so that the table is the same wherever it is made.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayfin.advisor.answer import Choice, Recommendation
from rayfin.advisor.candidates import ScenarioFacts
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.recommendation import recommend
from rayfin.config import Config, build_config
from rayfin.evaluation.quantities import show_seconds
from rayfin.hardware import Hardware
from rayfin.library.advice import scenario_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/recommendations.md"
GIB = 2**30
CPU_CORES, CPU_GIB = 16, 64
"""Of the machine without a GPU."""

# The config.json of two models, as their pages on the hub have it, without their names: shapes and
# family are all that there is to know.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-1.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Case:
    """A question to the advisor."""

    model: float | str
    """Billions of parameters, a hub name, or `config.json of NAME` for one of CONFIGS."""
    gpus: int
    """0 for the CPU."""
    gib: int = CPU_GIB
    """The memory of each GPU, or of the machine without one, in GiB."""
    rows: int = 5_000
    tokens: int = 300
    """The mean length of a sample."""
    latency: str | None = None
    latency_target_ms: float | None = None
    budget_hours: float | None = None
    priority: str | None = None

    @property
    def title(self) -> str:
        """The question in a few words."""
        model = f"{self.model:g}B" if isinstance(self.model, float) else str(self.model)
        machine = f"{self.gpus} x {self.gib} GiB" if self.gpus else f"CPU, {self.gib} GiB"
        more = [
            f"latency {self.latency}" if self.latency else "",
            f"{self.latency_target_ms:g} ms" if self.latency_target_ms else "",
            f"{self.budget_hours:g} h" if self.budget_hours else "",
            f"priority {self.priority}" if self.priority else "",
        ]
        return "; ".join(
            [model, machine, f"{self.rows:,} x {self.tokens}", *(one for one in more if one)]
        )

    @property
    def told(self) -> dict[str, Any]:
        """What is told of the scenario, by the names of `rayfin.recommend`'s arguments."""
        hardware = ("cpu", "single_gpu", "multi_gpu")[min(self.gpus, 2)]
        return {
            "hardware": hardware,
            "gpu_memory_gb": float(self.gib) if self.gpus else None,
            "num_gpus": self.gpus or None,
            "model_size_b": self.model if isinstance(self.model, float) else None,
            "rows": self.rows,
            "tokens_per_sample": float(self.tokens),
            "latency": self.latency,
            "latency_target_ms": self.latency_target_ms,
            "budget_hours": self.budget_hours,
            "priority": self.priority,
        }

    @property
    def machine(self) -> Hardware:
        """The machine, with what nobody is asked for as usual ones have it."""
        host = (CPU_GIB if self.gpus == 0 else 2 * self.gpus * self.gib) * GIB
        return Hardware(
            device="cuda" if self.gpus else "cpu",
            device_name="a GPU" if self.gpus else "a processor",
            device_count=self.gpus,
            device_memory=self.gib * GIB,
            cpu_count=CPU_CORES,
            host_memory=host,
            bf16=True,
        )


def cases() -> Iterator[Case]:
    """Yield the questions of the table."""
    for size in (0.5, 1.5, 3.0, 8.0, 14.0, 32.0, 70.0):  # sizes on each GPU
        yield from (Case(size, 1, gib) for gib in (12, 24, 40, 80))
    yield from (Case(size, 0) for size in (0.5, 1.5, 3.0, 8.0))
    for gpus in (2, 8):  # several GPUs
        yield from (Case(size, gpus, gib) for size in (8.0, 70.0) for gib in (24, 80))
    for rows in (1_000, 20_000, 200_000):  # more and less data
        yield from (Case(size, 1, gib, rows=rows) for size, gib in ((1.5, 12), (8.0, 24)))
    yield Case(70.0, 8, 80, rows=200_000)
    yield from (Case(8.0, 1, 24, tokens=tokens) for tokens in (30, 1500, 6000))
    for name in (  # names whose files are not here
        "meta-llama/Llama-3.1-8B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "mistralai/Mistral-7B-v0.3",
        "google/gemma-2-9b-it",
        "microsoft/phi-4",
        "Qwen/Qwen2.5-0.5B",
        "meta-llama/Llama-3.3-70B-Instruct",
    ):
        yield Case(name, 1, 24 if "70B" not in name else 80)
    yield from (Case(f"config.json of {name}", 1, 24) for name in CONFIGS)
    for size, gib in ((1.5, 24), (8.0, 24)):  # what is wanted of it
        yield from (Case(size, 1, gib, priority=one) for one in ("quality", "cost", "latency"))
        yield Case(size, 1, gib, latency="strict")
    yield Case(8.0, 1, 24, latency_target_ms=50.0)
    yield Case(8.0, 1, 24, rows=20_000, budget_hours=0.5)
    yield Case(8.0, 1, 24, rows=200_000, budget_hours=8.0)


def question(case: Case, directory: Path) -> tuple[Config, ScenarioFacts]:
    """Return the configuration and the facts of a case; a config.json is written to `directory`."""
    sections: dict[str, Any] = {}
    if isinstance(case.model, str):
        name = case.model
        if name.startswith("config.json of "):
            folder = directory / "model"
            folder.mkdir(exist_ok=True)
            shape = CONFIGS[name.removeprefix("config.json of ")]
            (folder / "config.json").write_text(json.dumps(shape))
            name = str(folder)
        sections["model"] = {"name": name}
    if case.gpus == 0:  # which else follows from how fast this machine's bfloat16 is
        sections.setdefault("model", {})["dtype"] = "float32"
    config, facts = scenario_of(build_config(sections, {}), case.told, progress=False)
    return config, replace(facts, hardware=case.machine)


def answers(knowledge: Knowledge, asked: Iterator[Case]) -> Iterator[tuple[Case, Recommendation]]:
    """Yield each case with the advisor's answer to it."""
    with tempfile.TemporaryDirectory() as directory:
        for case in asked:
            config, facts = question(case, Path(directory))
            yield case, recommend(facts, knowledge, 3, config=config)


HEADER = (
    "scenario",
    "source",
    "method",
    "rate",
    "rank",
    "batch",
    "recomputed",
    "tokens",
    "length",
    "memory",
    "time",
)


def cells(case: Case, answer: Recommendation) -> list[str]:
    """Return the table's row of a case: the first choice, or that there is none."""
    if answer.nothing_fits is not None:
        return [case.title, answer.source, f"none: {answer.nothing_fits}", *[""] * 8]
    first = answer.choices[0]
    return [case.title, answer.source, *chosen(first)]


def chosen(choice: Choice) -> list[str]:
    """Return the cells of a choice."""
    method, train, data = (choice.config[name] for name in ("method", "train", "data"))
    memory, seconds = choice.predictions.memory_bytes, choice.predictions.train_seconds
    epochs = train["num_train_epochs"]
    steps = f"{choice.predictions.steps} steps"
    workers = choice.config["scaling"]["num_workers"]
    # A step's samples are those of all workers, which share them.
    batch = f"{train['per_device_train_batch_size']} x {train['gradient_accumulation_steps']}"
    if workers > 1:
        batch += f", {workers} workers ({choice.config['scaling']['strategy']})"
    bits = method.get("quantization_bit")
    four = f", {bits} bits" if bits and choice.method != "qlora" else ""
    alpha = method.get("lora_alpha")
    rank = str(method["r"]) if "r" in method else "-"
    return [
        choice.method + four,
        f"{train['learning_rate']:g}",
        rank + (f" (alpha {alpha:g})" if alpha is not None else ""),
        batch,
        "yes" if train["gradient_checkpointing"] else "no",
        str(data["max_length"]),
        f"{epochs:g} epoch{'s' * (epochs != 1)}, {steps}" if epochs is not None else steps,
        f"{memory.expected / GIB:.1f} to {memory.high / GIB:.1f} GiB",
        show_seconds(seconds.expected),
    ]


def document(found: list[tuple[Case, Recommendation]]) -> str:
    """Return the whole page."""
    rows = [HEADER, ["---"] * len(HEADER), *(cells(*each) for each in found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# What is recommended

The first choice of `rayfin recommend` in {len(found)} scenarios, without any trials but those that
come with rayfin. `python experiments/recommendations_table.py` makes this page, and a test compares
it; nothing here was trained. How to read an answer: [recommend.md](recommend.md).

- **scenario**: the model by its size, its name on the hub, or its `config.json` alone; the GPUs
  and the memory of each, or a processor with {CPU_CORES} cores; rows x mean tokens; what was
  asked beside.
- **batch**: samples at once on all workers x accumulated; their product is a step's.
  **recomputed**: activations (gradient checkpointing). **tokens**: samples are cut at so many.
- **memory**: of one worker, expected to the upper bound of the 80 % interval, which has to fit.
  **time**: expected, on an A100 from 80 GiB, an A40 from 40, an L4 from 24 and a T4 below; where
  nothing was measured it may well be a factor of 2.5 off.

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print all choices, write nothing")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = []
    for case, answer in answers(Knowledge.of([]), cases()):
        found.append((case, answer))
        if args.print:
            print(" | ".join(cells(case, answer)), flush=True)
            for choice in answer.choices[1:]:
                print("    " + " | ".join(chosen(choice)))
    if not args.print:
        DOCUMENT.write_text(document(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
