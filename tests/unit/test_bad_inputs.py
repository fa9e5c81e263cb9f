"""What people get wrong: one line that names the value and the remedy, exit code 2, nothing lost.

All of it is found before Ray starts, and the storage is afterwards as it was before.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.history import History, TrialRecord
from rayfin.models import write_tiny
from rayfin.paths import Storage

ROOT = Path(__file__).resolve().parents[2]
BASE = ("model.name=tiny", "data.path=ok.jsonl", "storage=runs", "data.max_length=64")
SWEEP = ("sweep", *BASE, "sweep.parameters.method.r=[4,8]")
TRAIN = ("train", *BASE)
BUCKET = "storage=s3://bucket/runs"
AT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(directory)
    return directory


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: good and bad files, and in `runs` a history and an adapter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = [{"prompt": f"what is {n} and one", "completion": str(n + 1)} for n in range(8)]
    _write_data(tmp_path, rows)
    _write_configs(tmp_path)
    _write_models(tmp_path, tiny)
    (tmp_path / "garbage.sqlite").write_bytes(b"no database at all, but some bytes" * 9)
    (tmp_path / "garbage.parquet").write_bytes(b"no parquet")
    (tmp_path / "trials.jsonl").write_text('{"trial_id": 3}\n')
    _fill_storage(Storage.open(tmp_path / "runs"), tmp_path)
    return tmp_path


def _write_data(here: Path, rows: list[dict[str, str]]) -> None:
    def write(name: str, text: str) -> None:
        (here / name).write_text(text, encoding="utf-8")

    good = "".join(json.dumps(row) + "\n" for row in rows)
    write("ok.jsonl", good)
    write("empty.jsonl", "")
    write("one.jsonl", good.splitlines()[0])
    write("same.jsonl", (good.splitlines()[0] + "\n") * 4)
    write("columns.jsonl", '{"left": 1, "right": 2}\n')
    write("broken.jsonl", good + '{"prompt": "cut\n')
    write("pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    write("rows.txt", good)
    (here / "no-data").mkdir()


def _write_configs(here: Path) -> None:
    (here / "list.yaml").write_text("- train\n- model\n")
    (here / "broken.yaml").write_text("train: {max_steps: [1,\n")
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00train")
    (here / "typo.yaml").write_text("train: {learning_rat: 1.0e-3}\n")


def _write_models(here: Path, tiny: Path) -> None:
    def model(name: str, config: str, *links: str) -> None:
        (here / name).mkdir()
        (here / name / "config.json").write_text(config)
        for link in links:
            (here / name / link).symlink_to(tiny / link)

    config = (tiny / "config.json").read_text()
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    model("pickled", config, *tokenizer)
    (here / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    model("cut-short", config, *tokenizer)
    weights = (tiny / "model.safetensors").read_bytes()
    (here / "cut-short" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    model("broken-config", "{", *tokenizer, "model.safetensors")
    encoder = json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    model("encoder", encoder, *tokenizer, "model.safetensors")
    model("mute", config, "model.safetensors")


def _fill_storage(storage: Storage, here: Path) -> None:
    trial: dict[str, Any] = {
        "trial_id": "sweep-a-0123",
        "sweep_id": "sweep-a",
        "fingerprint": "0123",
        "status": "finished",
        "created_at": AT,
        "updated_at": AT,
        "spec": {"method": {"type": "lora", "r": 8}},
        "scenario": {},
        "metrics": {"eval_loss": 1.5},
        "curve": [],
        "versions": {},
        "directory": None,
    }
    with History.open(storage.history_url) as history:
        history.put(TrialRecord(**trial))
    source = here / "adapter"
    source.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    weights = struct.pack("<Q", len(header)) + header + b"1"
    (source / "adapter_model.safetensors").write_bytes(weights)
    registry = Registry(storage.adapters)
    for name in ("mine", "hurt"):
        registry.publish(name, source, {"base_model": "tiny"})
    (storage.adapters / "hurt" / "1" / "adapter_model.safetensors").write_bytes(weights[:-1])


def contents(root: Path) -> dict[str, str]:
    """Every file's digest, and every directory, but for what SQLite keeps beside an open file."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(root.rglob("*"))
        if not path.name.endswith(("-wal", "-shm"))
    }


@pytest.fixture
def untouched(place: Path) -> Iterator[Path]:
    """Whatever happens in the test, the storage and all other files stay as they are."""
    before = contents(place)
    yield place
    assert contents(place) == before


def case(name: str, *command: str, say: tuple[str, ...]) -> Any:
    """`say`: the value that is wrong first, then words of what is allowed or would help."""
    return pytest.param(command, say, id=name)


CONFIGURATION = [
    case("unknown-section", *SWEEP, "trian.max_steps=3", say=("trian", "did you mean 'train'")),
    case("unknown-key", *SWEEP, "method.rank=3", say=("method.rank", "did you mean 'method.r'")),
    case("key-in-file", "sweep", "typo.yaml", say=("learning_rat", "train.learning_rate")),
    case("no-override", *SWEEP, "method.r", say=("'method.r'", "section.key=value")),
    case("bad-yaml-value", *SWEEP, "train.seed=[1,", say=("train.seed", "[1,", "quote")),
    case("missing-file", "sweep", "nosuch.yaml", say=("'nosuch.yaml'", "YAML file")),
    case("missing-file-train", "train", "nosuch.yaml", say=("'nosuch.yaml'", "YAML file")),
    case("directory-as-file", "sweep", "no-data", say=("'no-data'", "YAML file")),
    case("list-as-file", "sweep", "list.yaml", say=("'list.yaml'", "mapping")),
    case("broken-file", "sweep", "broken.yaml", say=("'broken.yaml'", "line")),
    case("binary-file", "sweep", "binary.yaml", say=("'binary.yaml'", "YAML file")),
    case("text-for-number", *TRAIN, "train.max_steps=many", say=("'many'", "whole number")),
    case("fraction", *SWEEP, "train.max_steps=2.5", say=("2.5", "whole number")),
    case("number-for-section", *SWEEP, "train=7", say=("train: 7", "key: value")),
    case("null", *SWEEP, "train.seed=null", say=("train.seed: null", "whole number")),
    case("rank-zero", *TRAIN, "method.r=0", say=("method.r: 0", "greater than or equal to 1")),
    case("negative-lr", *SWEEP, "train.learning_rate=-1e-3", say=("-0.001", "greater than 0")),
    case("infinite-lr", *SWEEP, "train.learning_rate=.inf", say=("train.learning_rate", "finite")),
    case("val-size", *SWEEP, "data.val_size=1.5", say=("data.val_size: 1.5", "less than 1")),
    case("no-samples", *SWEEP, "sweep.num_samples=-2", say=("-2", "greater than or equal to 1")),
    case(
        "concurrency",
        *SWEEP,
        "sweep.max_concurrent_trials=few",
        say=("'few'", "whole number or 'auto'"),
    ),
    case("metric", *SWEEP, "sweep.metric=loss", say=("'loss'", "'eval_loss'", "'exact_match'")),
    case(
        "mode-against-metric",
        *SWEEP,
        "sweep.metric=exact_match",
        "sweep.mode=min",
        say=("mode min", "exact_match", "sweep.mode=max"),
    ),
    case("adapter-name", *SWEEP, "publish.name=a/b", say=("'a/b'", "letters, digits")),
    case(
        "alias-of-digits",
        *SWEEP,
        "publish={name: mine, alias: '7'}",
        say=("'7'", "version"),
    ),
    case("publish-without-name", *SWEEP, "publish={}", say=("publish.name", "give it a value")),
    case("one-module", *SWEEP, "method.target_modules=q_proj", say=("'q_proj'", "list")),
    case("no-modules", *SWEEP, "method.target_modules=[]", say=("[]", "'all-linear'")),
]

METHODS = [
    case("method", *SWEEP, "method.type=qlor", say=("'qlor'", "allowed", "'qlora'")),
    case(
        "full-over-4-bit",
        *SWEEP,
        "method={type: full, quantization_bit: 4}",
        "sweep.parameters={train.seed: [0, 1]}",
        say=("method.quantization_bit=4", "full", "quantization_bit=null"),
    ),
    case(
        "full-over-4-bit-swept",
        *SWEEP,
        "sweep.parameters={method.type: [lora, full], method.quantization_bit: [4, 8]}",
        say=("method.quantization_bit=4", "full", "quantization_bit=null"),
    ),
    case(
        "packed-p-tuning",
        *TRAIN,
        "method.type=p_tuning",
        "train.packing=true",
        say=("train.packing=true", "p_tuning", "train.packing=false"),
    ),
    case(
        "adalora-budget",
        *TRAIN,
        "method={type: adalora, init_r: 4, target_r: 8}",
        say=("target_r=8", "below 4"),
    ),
    case(
        "ia3-feedforward",
        *TRAIN,
        "method={type: ia3, target_modules: [k_proj], feedforward_modules: [down_proj]}",
        say=("'down_proj'", "add it there"),
    ),
    case(
        "no-such-module",
        *SWEEP,
        "method.target_modules=[q_proj,query_key_value]",
        say=("'query_key_value'", "'tiny'", "q_proj", "all-linear"),
    ),
    case(
        "too-many-virtual-tokens",
        *TRAIN,
        "method={type: prompt_tuning, num_virtual_tokens: 64}",
        say=("method.num_virtual_tokens=64", "data.max_length=64", "fewer"),
    ),
    case(
        "beyond-the-positions",
        *TRAIN,
        "data.max_length=4090",
        "method={type: p_tuning, num_virtual_tokens: 20}",
        say=("data.max_length=4090", "4096", "data.max_length=4076"),
    ),
]

SPACE = [
    case(
        "unknown-axis", *SWEEP, "sweep.parameters.method.rnk=[4]", say=("method.rnk", "method.r'")
    ),
    case(
        "axis-outside-the-trial",
        *SWEEP,
        "sweep.parameters.storage=[a,b]",
        say=("sweep.parameters.storage", "model, data, method, train"),
    ),
    case(
        "workers-in-a-sweep",
        *SWEEP,
        "scaling.num_workers=2",
        "sweep.parameters.train.per_device_train_batch_size=[2,3]",
        say=(
            "sweep.parameters.train.per_device_train_batch_size",
            "scaling.num_workers=2 can't share the 3 samples",
            "train.gradient_accumulation_steps=2",
        ),
    ),
    case(
        "strategy-in-a-sweep",
        *SWEEP,
        "scaling.strategy=fsdp",
        "sweep.parameters.method.quantization_bit=[4,8]",
        say=(
            "sweep.parameters.method.quantization_bit",
            "scaling.strategy=fsdp can't train",
            "method.quantization_bit=4, or ddp",
        ),
    ),
    case(
        "offload-in-a-sweep",
        *SWEEP,
        "scaling.cpu_offload=true",
        say=("scaling.cpu_offload=true", "name one of fsdp"),
    ),
    case("no-axis", *SWEEP, "sweep.parameters={}", say=("sweep.parameters", "rayfin train")),
    case("empty-axis", *SWEEP, "sweep.parameters.method.r=[]", say=("method.r", "at least one")),
    case("axis-no-list", *SWEEP, "sweep.parameters.method.r=4", say=("method.r", "list of values")),
    case("axis-value", *SWEEP, "sweep.parameters.method.r=[4,x]", say=("'x'", "whole number")),
    case(
        "range-of-fractions",
        *SWEEP,
        "sweep.parameters.method.r={space: uniform, lower: 2, upper: 9}",
        say=("sweep.parameters.method.r", "randint"),
    ),
    case(
        "range-upside-down",
        *SWEEP,
        "sweep.parameters.train.learning_rate={space: uniform, lower: 2, upper: 1}",
        say=("lower (2.0)", "less than upper (1.0)"),
    ),
    case(
        "range-from-zero",
        *SWEEP,
        "sweep.parameters.train.learning_rate={space: loguniform, lower: 0, upper: 1}",
        say=("lower (0.0)", "above 0"),
    ),
    case(
        "unknown-range",
        *SWEEP,
        "sweep.parameters.method.r={space: gauss, lower: 1, upper: 2}",
        say=("'gauss'", "'randint'"),
    ),
    case(
        "grid-of-a-range",
        *SWEEP,
        "sweep.search=grid",
        "sweep.parameters.method.r={space: randint, lower: 1, upper: 9}",
        say=("method.r", "list of values", "random"),
    ),
    case(
        "swept-model-absent",
        *SWEEP,
        "sweep.parameters.model.name=[tiny,./nowhere]",
        say=("'./nowhere'", "smollm2-135m", "directory"),
    ),
]

DATA = [
    case("missing-data", *SWEEP, "data.path=nosuch.jsonl", say=("'nosuch.jsonl'", "pydocs")),
    case("empty-data", *SWEEP, "data.path=empty.jsonl", say=("'empty.jsonl'", "rows")),
    case("empty-directory", *SWEEP, "data.path=no-data", say=("'no-data'", ".jsonl")),
    case("unknown-extension", *SWEEP, "data.path=rows.txt", say=("'.txt'", ".parquet")),
    case("no-valid-row", *SWEEP, "data.path=columns.jsonl", say=("columns.jsonl", "prompt")),
    case("broken-row", *TRAIN, "data.path=broken.jsonl", say=("broken.jsonl:9", "on_bad_row=skip")),
    case("one-row", *SWEEP, "data.path=one.jsonl", say=("'one.jsonl'", "at least 2")),
    case("same-rows", *SWEEP, "data.path=same.jsonl", say=("'same.jsonl'", "different")),
    case("preferences", *SWEEP, "data.path=pairs.jsonl", say=("'pairs.jsonl'", "completion")),
    case("wrong-format", *SWEEP, "data.format=messages", say=("ok.jsonl", "messages")),
    case("cut-answers", *SWEEP, "data.max_length=8", say=("data.max_length: 8", "at least")),
]

MODELS = [
    case("absent-model", *SWEEP, "model.name=./nowhere", say=("'./nowhere'", "smollm2-135m")),
    case("empty-model", *SWEEP, "model.name=no-data", say=("no-data", "config.json")),
    case("pickled-model", *SWEEP, "model.name=pickled", say=("pickled", "safetensors")),
    case("model-cut-short", *TRAIN, "model.name=cut-short", say=("cut-short", "whole copy")),
    case("broken-model", *SWEEP, "model.name=broken-config", say=("broken-config", "copy")),
    case("no-causal-model", *SWEEP, "model.name=encoder", say=("BertModel", "ForCausalLM")),
    case("no-tokenizer", *SWEEP, "model.name=mute", say=("mute", "tokenizer.json")),
    case("revision-of-bundled", *TRAIN, "model.revision=main", say=("'main'", "leave it out")),
]

PLACES = [
    case(
        "storage-below-a-file", *SWEEP, "storage=ok.jsonl/runs", say=("ok.jsonl/runs", "storage=")
    ),
    case("storage-in-proc", *SWEEP, "storage=/proc/rayfin", say=("/proc/rayfin", "storage=DIR")),
    case("storage-history", *TRAIN, BUCKET, say=("s3://bucket/runs", "history=postgresql")),
    case("storage-registry", *TRAIN, BUCKET, "publish.name=a", say=("s3://b", "publish.storage=")),
    case("storage-scheme", *TRAIN, "storage=ftp://a/b", say=("ftp://a/b", "s3://BUCKET/PATH")),
    case("storage-bucket", *TRAIN, "storage=gs://bucket", say=("'gs://bucket'", "gs://BUCKET/PA")),
    case("storage-dots", *TRAIN, "storage=s3://b/../etc", say=("s3://b/../etc", "..")),
    case("storage-fragment", *TRAIN, "storage=s3://b/x#y", say=("s3://b/x#y", "#")),
    case("storage-secret", *TRAIN, "storage=s3://me:hush@b/x", say=("URL", "s3://BUCKET/PATH")),
    case("history-scheme", *SWEEP, "history=mysql://host/db", say=("mysql", "postgresql")),
    case("history-no-url", *SWEEP, "history=h.sqlite", say=("'h.sqlite'", "sqlite:///h.sqlite")),
    case(
        "history-is-no-database",
        *SWEEP,
        "history=sqlite:///garbage.sqlite",
        say=("garbage.sqlite", "name another"),
    ),
    case(
        "postgresql-unreachable",
        *SWEEP,
        "history=postgresql+psycopg://me:hush@127.0.0.1:1/trials",
        say=("127.0.0.1:1", "server runs"),
    ),
    case(
        "cluster-unreachable", *SWEEP, "--address", "127.0.0.1:1", say=("127.0.0.1:1", "ray start")
    ),
    case("cluster-address", *SWEEP, "--address", "nowhere", say=("'nowhere'", "HOST:PORT")),
    case(
        "cluster-for-train",
        *TRAIN,
        "scaling.num_workers=2",
        "--address=127.0.0.1:1",
        say=("127.0.0.1:1", "ray start"),
    ),
]

HISTORY = [
    case("no-history", "history", "list", "storage=none", say=("none", "storage=DIR")),
    case("unknown-trial", "history", "show", "x9", "storage=runs", say=("'x9'", "history list")),
    case("import-missing", "history", "import", "no.jsonl", "storage=runs", say=("no.jsonl",)),
    case(
        "import-garbage",
        "history",
        "import",
        "garbage.parquet",
        "storage=runs",
        say=("garbage.parquet",),
    ),
    case(
        "import-no-trial",
        "history",
        "import",
        "trials.jsonl",
        "storage=runs",
        say=("'trials.jsonl'", "nothing"),
    ),
    case(
        "import-unknown",
        "history",
        "import",
        "rows.txt",
        "storage=runs",
        say=("rows.txt", ".jsonl"),
    ),
    case(
        "export-unknown",
        "history",
        "export",
        "out.xls",
        "storage=runs",
        say=("out.xls", ".jsonl"),
    ),
    case("unknown-status", "history", "list", "--status=ended", say=("'ended'", "finished")),
    case("negative-limit", "history", "list", "--limit=-1", say=("'-1'", "--help")),
]

ADAPTERS = [
    case("unknown-adapter", "adapters", "show", "yours", "storage=runs", say=("'yours'", "mine")),
    case("unknown-version", "adapters", "rm", "mine@4", "storage=runs", say=("mine@4", "1")),
    case("unknown-alias", "adapters", "show", "mine@prod", "storage=runs", say=("prod", "latest")),
    case("hostile-name", "adapters", "show", "../mine", "storage=runs", say=("../mine", "letters")),
    case(
        "corrupt-adapter",
        "adapters",
        "verify",
        "hurt@1",
        "storage=runs",
        say=("adapter_model.safetensors", "hurt"),
    ),
    case(
        "promote-to-digits",
        "adapters",
        "promote",
        "mine@1",
        "--alias=3",
        "storage=runs",
        say=("'3'", "version"),
    ),
]

SERVE = [
    case("serve-unknown-model", "serve", "model.name=nosuch", say=("'nosuch'", "smollm2-135m")),
    case("no-slots", "serve", "engine.slots=0", say=("engine.slots", "0", "1")),
    case("too-long", "serve", "model.name=tiny", "engine.max_length=5000", say=("5000", "4096")),
    case("port-out-of-range", "serve", "deployment.port=99999", say=("99999", "65535")),
    case("history-without-scheme", "serve", "history=x.db", say=("'x.db'", "sqlite:///x.db")),
    case("serve-storage-url", "serve", "storage=s3://b/x", say=("s3://b/x", "storage=DIR")),
    case("int8-of-4-bit", "serve", "engine.weights=int8", "engine.quantization_bit=4",
         say=("int8", "quantization_bit=4")),
    case("serve-mistyped-key", "serve", "engine.slot=3", say=("engine.slot", "engine.slots")),
    case("chat-settings-and-url", "chat", "--url=http://127.0.0.1:1", "engine.slots=2",
         say=("engine.slots=2", "--url")),
]  # fmt: skip

COMMAND = [
    case("unknown-verb", "tune", say=("'tune'", "sweep", "--help")),
    case("no-verb", "history", say=("VERB", "rayfin history --help")),
    case("unknown-option", *SWEEP, "--fast", say=("'--fast'", "rayfin sweep --help")),
    case("option-without-value", *SWEEP, "--address", say=("--address", "--help")),
]


def exit_code(*command: str) -> int:
    try:
        return main(command)
    except SystemExit as stop:  # argparse's own way out
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("command", "say"),
    [
        *CONFIGURATION, *METHODS, *SPACE, *DATA, *MODELS, *PLACES, *HISTORY, *ADAPTERS, *SERVE,
        *COMMAND,
    ],
)  # fmt: skip
def test_one_line_with_the_value_and_the_remedy(
    command: tuple[str, ...],
    say: tuple[str, ...],
    untouched: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(*command) == 2
    out, err = capfd.readouterr()
    assert_one_line(out, err, say)
    assert "hush" not in err  # a password
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


def assert_one_line(out: str, err: str, say: tuple[str, ...]) -> None:
    assert out == ""
    assert err.startswith("rayfin: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert [words for words in say if words not in err] == [], err


def test_a_hub_model_without_a_hub(
    untouched: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(untouched / "cache"))
    assert exit_code(*SWEEP, "model.name=nobody/no-model") == 2
    assert_one_line(*capfd.readouterr(), ("'nobody/no-model'", "HF_HUB_OFFLINE", "directory"))


def test_a_gpu_that_is_not_there(
    untouched: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in (SWEEP, TRAIN):
        assert exit_code(*command, "scaling.use_gpu=true") == 2
        say = ("scaling.use_gpu: true", "scaling.use_gpu=false")
        assert_one_line(*capfd.readouterr(), say)


def test_an_address_in_the_environment(
    untouched: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert exit_code(*SWEEP) == 2
    assert_one_line(*capfd.readouterr(), ("127.0.0.1:1", "RAY_ADDRESS"))


SCRIPT = ROOT / "experiments" / "sweep_qlora.py"
# Nothing heavy may have been imported: mistakes are for the keyboard's next keystroke.
LIGHT = """
import sys
from rayfin.cli import main
code = main(sys.argv[1:])
assert not {"ray", "torch", "transformers"} & sys.modules.keys(), "heavy imports"
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("command", "say"),
    [
        case(
            "script-axis", str(SCRIPT), "sweep.parameters.method.rank=[4]", say=("rank", "method.r")
        ),
        case(
            "script-data",
            str(SCRIPT),
            "data.path=empty.jsonl",
            "storage=runs",
            say=("empty.jsonl",),
        ),
        case("script-option", str(SCRIPT), "--bogus", say=("'--bogus'", "sweep_qlora.py --help")),
        case("light-data", "-c", LIGHT, *SWEEP, "data.path=one.jsonl", say=("one.jsonl", "2")),
        case(
            "light-model", "-c", LIGHT, *SWEEP, "model.name=pickled/x", say=("pickled/x", "model")
        ),
        case("light-address", "-c", LIGHT, *SWEEP, "--address=127.0.0.1:1", say=("127.0.0.1:1",)),
    ],
)
def test_in_a_process_of_its_own(
    command: tuple[str, ...], say: tuple[str, ...], untouched: Path
) -> None:
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=untouched,
    )
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stdout, done.stderr, say)
