"""Serves two adapters from one base model, and shows the switch from one to the other.

    python experiments/serve_adapters.py                 # the two newest adapters of ./runs
    python experiments/serve_adapters.py storage=/mnt/rayfin model.name=Qwen/Qwen2.5-0.5B-Instruct
    python experiments/serve_adapters.py --stay          # and goes on serving, until Ctrl-C

Where the registry has fewer than two adapters that the base model can answer with, a LoRA and a
P-Tuning adapter are trained first, on the built-in demonstration data (a few minutes on 2 cores):
adapters of different kinds answer in one batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rayfin
from rayfin.cli import guarded
from rayfin.cli import train as training
from rayfin.cli.parser import Parser
from rayfin.cli.settings import ShowServeSettings, add_settings, split_settings

# As in the demonstration data: which module of Python has it?
QUESTION = "Path.symlink_to: Make this path a symlink pointing to the target path."
TRAINED: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "pydocs-lora": {
        "method": {"type": "lora"},
        "train": {"learning_rate": 1.5e-3, "max_steps": 20},
    },
    "pydocs-p-tuning": {
        "method": {"type": "p_tuning"},
        "train": {"learning_rate": 2e-3, "max_steps": 60},
    },
}
DATA = {"max_samples": 320, "max_length": 128}
TRAINING = {"per_device_train_batch_size": 8, "eval_steps": 20}


def run(args: argparse.Namespace) -> int:
    from rayfin.library.deployments import serve_configuration

    config = serve_configuration(*split_settings(args.settings))
    names = _published(config)
    if len(names) < 2:
        for name, settings in TRAINED.items():
            print(f"\nTraining {name}", flush=True)
            result = rayfin.train(
                {
                    "model": {"name": config.model.name},
                    "data": DATA,
                    "method": settings["method"],
                    "train": TRAINING | settings["train"],
                    "publish": {"name": name},
                    "storage": config.storage,
                }
            )
            if code := training.show(result, as_json=False):
                return code
        names = _published(config)
    first, second = names[:2]
    print(f"\nServing {config.model.name} with {first} and {second} ...", flush=True)
    with rayfin.serve(config, address="local") as server:
        client = server.client
        print(f"\n{QUESTION}")
        print("\nEverybody at once, in one batch:")
        models = [config.model.name, first, second]
        _ask(client, models)  # adapters come from disk the first time
        with ThreadPoolExecutor(len(models)) as pool:
            _show(pool.map(lambda model: _ask(client, [model])[0], models))
        print("\nOne after the other, switched with every request:")
        _show(_ask(client, [first, second] * 3))
        print(f"\n  rayfin chat --url {server.url} --use {first}")
        if args.stay:
            print("Ctrl-C stops it.", flush=True)
            try:
                while True:
                    time.sleep(1)
            except KeyboardInterrupt:
                print("Stopping.")
    return 0


def _published(config: Any) -> list[str]:
    """Adapters of the base model, the one with the newest version first."""
    from rayfin.adapters import Catalog
    from rayfin.adapters.files import FULL
    from rayfin.paths import Storage

    versions = [
        version
        for version in Catalog(Storage.open(config.storage).adapters).list()
        if version.base_model == config.model.name and version.peft_type != FULL
    ]
    newest = sorted(versions, key=lambda v: str(v.metadata.get("created_at")), reverse=True)
    return list(dict.fromkeys(version.name for version in newest))


def _ask(client: Any, models: Sequence[str]) -> list[tuple[str, str, float]]:
    """(who answered, what, after how many seconds), one question after the other."""
    from rayfin.data.pydocs import QUESTION as INSTRUCTION

    answers = []
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": QUESTION},
    ]
    for model in models:
        started = time.perf_counter()
        reply = client.chat(model, messages, {"max_tokens": 16, "temperature": 0})
        text = "".join(reply)
        answers.append((reply.model, text, time.perf_counter() - started))
    return answers


def _show(answers: Any) -> None:
    for model, text, seconds in answers:
        print(f"  {model:22} {seconds:5.2f} s  {' '.join(text.split())}", flush=True)


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, ShowServeSettings)
    parser.add_argument("--stay", action="store_true", help="go on serving after the show")
    raise SystemExit(guarded(lambda: run(parser.parse_args())))
