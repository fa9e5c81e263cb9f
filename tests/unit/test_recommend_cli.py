"""`rayfin recommend`: what it prints, what it writes, and that what it writes runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator

from rayfin.advisor import knowledge
from rayfin.advisor.answer import Recommendation
from rayfin.cli import main
from rayfin.config import load_config, load_serve_config
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage
from rayfin.training.combination import check_combination
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import check_space

SCHEMA = Path(__file__).parents[2] / "docs" / "recommendation.schema.json"
GIVEN = ("model.name=tiny", "data.path=pydocs", "data.max_samples=24")
LENGTH = "data.max_length=192"
RATES = (1e-4, 5e-4, 2e-3, 8e-3, 3e-2)


def schema() -> str:
    """As it is published; `python tests/unit/test_recommend_cli.py` writes it."""
    return json.dumps(Recommendation.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own; the cache too, but not that of the bundled models' weights.

    Without the trials that come with rayfin: what they say is not these tests'.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knowledge, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(knowledge, "_reference", lambda: b"")


def answered(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["recommend", *GIVEN, "--json", *arguments]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    try:
        code = main(["recommend", *arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("rayfin: ")
    return err


# --- the answer ---------------------------------------------------------------------------------


def test_the_published_schema_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema()
    Draft202012Validator.check_schema(json.loads(schema()))


def test_json_is_one_line_that_the_schema_describes(capfd: pytest.CaptureFixture[str]) -> None:
    answer = answered(capfd)
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(answer)
    assert Recommendation.model_validate(answer).model_dump(mode="json") == answer
    assert [choice["rank"] for choice in answer["choices"]] == [1, 2, 3]
    for choice in answer["choices"]:
        for name in ("shortfall", "memory_bytes", "train_seconds"):
            found = choice["predictions"][name]
            assert 0 <= found["low"] <= found["expected"] <= found["high"], name
        assert choice["predictions"]["divergence"] is None  # no trial tells
        check_combination(load_config(choice["config"], []))
    assert any(point["front"] for point in answer["points"])


def test_the_schema_refuses_what_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    answer = answered(capfd)
    check = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert not check.is_valid(answer | {"source": "guessed"})
    assert not check.is_valid(answer | {"more": 1})
    assert not check.is_valid({name: answer[name] for name in answer if name != "choices"})


def test_k_says_how_many_and_none_repeats_another(capfd: pytest.CaptureFixture[str]) -> None:
    answer = answered(capfd, "-k", "5")
    assert len(answer["choices"]) == 5
    assert len({json.dumps(choice["config"]) for choice in answer["choices"]}) == 5
    assert len(answered(capfd, "-k", "1")["choices"]) == 1


def test_what_is_given_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    given = {"method.r": 6, "train.learning_rate": 7e-4, "train.seed": 3, "data.max_length": 80}
    arguments = [f"{name}={value}" for name, value in given.items()]
    answer = answered(capfd, "-k", "4", *arguments)
    for choice in answer["choices"]:
        for name, value in given.items():
            section, leaf = name.split(".")
            assert choice["config"][section][leaf] == value
            assert name not in choice["settings"]
        assert choice["config"]["data"]["max_samples"] == 24
    assert answer["scenario"]["sequence_length"] == 80


def test_a_given_method_is_the_only_one(capfd: pytest.CaptureFixture[str]) -> None:
    answer = answered(capfd, "method.type=ia3")
    assert {point["method"] for point in answer["points"]} == {"ia3"}
    assert {choice["method"] for choice in answer["choices"]} == {"ia3"}


def test_a_file_is_read_first(capfd: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("model: {name: tiny}\ndata: {max_samples: 24}\ntrain: {seed: 7}\n")
    assert main(["recommend", "my.yaml", "--json", "train.seed=8"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["choices"][0]["config"]["train"]["seed"] == 8


@pytest.mark.skipif(not knowledge._reference(), reason="no trials come with this copy of rayfin")
def test_a_first_answer_rests_on_the_trials_that_come_with_rayfin(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["recommend", "model.name=tiny", "data.path=pydocs", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    named = {record.trial_id for record in knowledge.reference_trials()}
    assert (answer["source"], answer["trials"]) == ("learned", 0)
    for choice in answer["choices"]:
        assert choice["trials"]
        for basis in choice["trials"]:
            assert basis["trial_id"] in named and basis["reference"] is True
            assert re.search(
                r"learning_rate=\S+ .* on \w+: (eval_loss [\d.]+|\w+)", basis["summary"]
            )


GUIDE = Path(__file__).parents[2] / "docs" / "recommend.md"


@pytest.mark.smollm2
def test_the_guides_commands_run(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(24)]
    Path("my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        said, _, comment = command.partition("#")
        program, *arguments = said.split()
        assert program == "rayfin" and arguments[0] in ("recommend", "estimate")
        assert main(arguments) == (1 if "exit code 1" in comment else 0), command
    assert "nothing fits: smollm2-135m needs " in capfd.readouterr().err


# --- the scenario -------------------------------------------------------------------------------


def test_another_machine_can_be_described(capfd: pytest.CaptureFixture[str]) -> None:
    here = answered(capfd)
    assert here["scenario"]["hardware"] == "cpu"
    for arguments in (
        ("--hardware", "single_gpu", "--gpu-memory-gb", "24"),
        ("--gpu-memory-gb", "24"),
    ):
        gpu = answered(capfd, *arguments)
        assert gpu["scenario"]["hardware"] == "single_gpu"
        assert gpu["scenario"]["gpu_memory_gb"] == 24
        assert gpu["rule"].startswith("LoRA is enough")
        first = gpu["choices"][0]
        train = first["config"]["train"]
        assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 16
        assert first["feasibility"]["memory"] is True
        assert first["config"]["data"]["max_length"] == 1024  # whatever the GPU
    several = answered(capfd, "--num-gpus", "2", "--gpu-memory-gb", "80")
    assert several["scenario"]["hardware"] == "multi_gpu"
    assert several["choices"][0]["config"]["scaling"]["num_workers"] == 2


NOTHING = [
    (
        ("--gpu-memory-gb", "1.01"),
        r"nothing fits: tiny needs .* 1\.0 GiB on a GPU; what would: a GPU",
    ),
    (("--budget-hours", "1e-9"), r"nothing ends in time: .* --budget-hours 1e-09; use fewer"),
]


@pytest.mark.parametrize(("arguments", "said"), NOTHING, ids=[case[0][0] for case in NOTHING])
def test_where_nothing_fits_there_is_no_answer_but_what_would(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["recommend", *GIVEN, *arguments, "--picture", "it.svg", "--scaffold", "mine"]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(f"rayfin: {said}", err)
    assert main(["recommend", *GIVEN, *arguments, "--json"]) == 1
    out, err = capfd.readouterr()
    answer = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(answer)
    assert (answer["choices"], answer["points"], err) == ([], [], "")
    assert re.match(said, answer["nothing_fits"])
    assert not Path("it.svg").exists() and not Path("mine").exists()


def test_what_fits_the_budget_and_the_latency_is_said_to(capfd: pytest.CaptureFixture[str]) -> None:
    plain = answered(capfd)
    assert plain["nothing_fits"] is None
    assert plain["choices"][0]["feasibility"]["budget"] is None
    met = answered(capfd, "--budget-hours", "1000", "--latency-target-ms", "1e6")
    assert met["scenario"]["latency"] == "strict"
    for choice in met["choices"]:
        assert choice["feasibility"] == {"memory": True, "budget": True, "latency": None}
        assert choice["predictions"]["first_token_ms"] is None  # nothing was served here
    assert any(note.startswith("whether 1e+06 ms to the first token") for note in met["notes"])


def test_the_priority_decides_what_time_is_worth(capfd: pytest.CaptureFixture[str]) -> None:
    found = {}
    for priority in ("quality", "cost", "latency"):
        answer = answered(capfd, "--priority", priority)
        assert answer["scenario"]["priority"] == priority
        found[priority] = answer["choices"][0]["predictions"]["train_seconds"]["expected"]
    assert found["cost"] <= found["quality"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "0"], "whole number from 1 to 100"),
        (["-k", "many"], "whole number from 1 to 100"),
        (["--hardware", "tpu"], "'tpu' is not allowed (did you mean 'cpu'?)"),
        (["--latency", "fast"], "'fast' is not allowed; it should be strict or normal"),
        (
            ["--priority", "beauty"],
            "'beauty' is not allowed; it should be quality or cost or latency",
        ),
        (["--gpu-memory-gb", "-3"], "gpu_memory_gb=-3.0 must be a positive number"),
        (["--gpu-memory-gb", "much"], "invalid float value: 'much'"),
        (["--num-gpus", "-1"], "num_gpus=-1 must be 0 or more"),
        (["--budget-hours", "nan"], "budget_hours=nan must be a positive number"),
        (["--latency-target-ms", "0"], "latency_target_ms=0.0 must be a positive number"),
        (["--scenario", "mine"], "'--scenario' is no option of rayfin recommend"),
        (["data.path=gone.jsonl"], "gone.jsonl"),
        (["model.name=tyni"], "tyni"),
        (["method.rank=4"], "method.rank"),
        (["gone.yaml"], "gone.yaml"),
        (["history=nonsense"], "is not a URL"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    settings = [] if arguments == ["gone.yaml"] else list(GIVEN)
    assert message in refused(capfd, *settings, *arguments)


def test_settings_that_leave_nothing_to_train_are_one_clear_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ("method.type=p_tuning", "method.num_virtual_tokens=64", "data.max_length=64")
    assert "use fewer virtual tokens" in refused(capfd, *GIVEN, *given)


def test_a_history_that_can_not_be_read_is_one_clear_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("history.sqlite").write_text("this is no database")
    url = f"sqlite:///{Path('history.sqlite').resolve()}"
    assert "history.sqlite" in refused(capfd, *GIVEN, f"history={url}")


def test_nothing_is_written_unless_asked_for(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answered(capfd)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}  # what the reference teaches


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_is_well_formed_and_shows_every_candidate(
    capfd: pytest.CaptureFixture[str],
) -> None:
    answer = answered(capfd, "--picture", "made/it.svg")
    root = ElementTree.parse("made/it.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    dots = root.findall(f".//{svg}path[{svg}title]")
    assert len(dots) == len(answer["points"])
    for dot in dots:
        x, y = map(float, re.findall(r"[\d.]+", dot.attrib["transform"])[:2])
        assert 0 < x < 760 and 0 < y < 460
    # Every method has a colour and a mark that no other has.
    methods = {point["method"] for point in answer["points"]}
    assert len(methods) >= 9
    for attribute in ("fill", "d"):
        assert len({dot.attrib[attribute] for dot in dots}) == len(methods)
    assert f"{len(dots)} candidates" in root.find(f"{svg}desc").text
    texts = {text.text for text in root.iter(f"{svg}text")}
    assert {"1", "2", "3", "lora", "p_tuning"} <= texts


def test_the_front_is_what_no_other_candidate_beats(capfd: pytest.CaptureFixture[str]) -> None:
    points = answered(capfd)["points"]
    for point in points:
        beaten = any(
            other["train_seconds"] <= point["train_seconds"]
            and other["shortfall"] < point["shortfall"]
            for other in points
        )
        assert not (point["front"] and beaten)


def test_a_picture_that_can_not_be_written_is_one_clear_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("file").write_text("")
    assert "--picture: 'file/it.svg' can't be written" in refused(
        capfd, *GIVEN, "--picture", "file/it.svg"
    )


# --- the scaffold -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("method.type=full",),
        ("method.type=adalora", "method.init_r=96", "method.target_r=64"),
        ("method.type=rslora", "method.r=600"),
        ("method.type=qlora", "method.quantization_bit=8"),
        ("method.type=p_tuning", "data.max_length=32"),
        ("method.type=ia3",),
        ("method.type=prefix_tuning",),
        ("--num-gpus", "2", "--gpu-memory-gb", "80"),
        ("sweep.num_samples=3", "sweep.metric=perplexity", "publish.name=mine"),
    ],
)
def test_the_scaffold_is_read_back(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    answer = answered(capfd, *arguments, "--scaffold", "mine")
    folder = Path("mine")
    assert {path.name for path in folder.iterdir()} == {
        "train.yaml", "sweep.yaml", "serve.yaml", "README.md"
    }  # fmt: skip
    train = load_config(folder / "train.yaml", [])
    check_combination(train)
    first = load_config(answer["choices"][0]["config"], [])
    for section in ("model", "method", "train", "scaling"):
        assert getattr(train, section) == getattr(first, section)
    assert train.publish is not None
    assert train.publish.name == ("mine" if "publish.name=mine" in arguments else "pydocs")
    for method in ("full", "qlora", "ia3"):
        assert load_config(folder / "train.yaml", [f"method.type={method}"]).method.type == method
    sweep = load_config(folder / "sweep.yaml", [])
    check_space(SearchSpace(sweep))
    assert "train.learning_rate" in sweep.sweep.parameters
    assert sweep.method.type == train.method.type
    if "sweep.metric=perplexity" in arguments:
        assert sweep.sweep.metric == "perplexity"
    serve = load_serve_config(folder / "serve.yaml", [])
    if train.method.type == "full":  # what is served is what was trained
        assert serve.model.name == str(Path("runs/adapters/pydocs/1").resolve())
    else:
        assert serve.model == train.model
    assert serve.engine.quantization_bit == train.method.quantization_bit
    assert serve.engine.max_rank >= train.method.rank
    assert serve.storage == sweep.storage == train.storage
    notes = (folder / "README.md").read_text()
    assert "rayfin train train.yaml" in notes and answer["choices"][0]["method"] in notes


def test_the_scaffold_serves_the_ranks_that_pissa_saves(capfd: pytest.CaptureFixture[str]) -> None:
    fixed = ("method.type=lora", "method.init_lora_weights=pissa", "method.r=64")
    answered(capfd, *fixed, "--scaffold", "mine")
    sweep = load_config(Path("mine/sweep.yaml"), [])
    serve = load_serve_config(Path("mine/serve.yaml"), [])
    assert serve.engine.max_rank == 2 * max(sweep.sweep.parameters["method.r"])


def test_the_scaffold_holds_no_password(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfin.library.advice.begun_history", lambda _: None)
    url = "history=postgresql://me:geheim@db.example:5433/trials?sslmode=require&sslpassword=geheim"
    answered(capfd, url, "--scaffold", "mine")
    for path in Path("mine").iterdir():
        assert "geheim" not in path.read_text(), path
    plain = "postgresql+psycopg://me@db.example:5433/trials?sslmode=require"
    assert load_config(Path("mine/sweep.yaml"), []).history == plain
    assert load_serve_config(Path("mine/serve.yaml"), []).history == plain
    assert "PGPASSWORD" in Path("mine/README.md").read_text()


@pytest.mark.parametrize("taken", ["train.yaml", "sweep.yaml", "serve.yaml", "README.md"])
def test_the_scaffold_overwrites_nothing(capfd: pytest.CaptureFixture[str], taken: str) -> None:
    Path("mine").mkdir()
    (Path("mine") / taken).write_text("precious")
    line = refused(capfd, *GIVEN, "--scaffold", "mine")
    assert f"'mine/{taken}' exists; give --scaffold a new directory" in line
    assert [path.read_text() for path in Path("mine").iterdir()] == ["precious"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_scaffold_of_runs_in_a_bucket_serves_from_the_registry(
    capfd: pytest.CaptureFixture[str], method: str
) -> None:
    bucket = ("storage=s3://bucket/runs", "history=sqlite:////nowhere/h.sqlite")
    given = (f"method.type={method}", "publish.name=mine", "publish.storage=here")
    answered(capfd, *bucket, *given, "--scaffold", "mine")
    here = str(Path("here").resolve())
    for name in ("train.yaml", "sweep.yaml"):
        config = load_config(Path("mine", name), [])
        assert config.storage == "s3://bucket/runs"
        assert config.publish is not None and config.publish.storage == here
    serve = load_serve_config(Path("mine", "serve.yaml"), [])
    assert serve.storage == here
    if method == "full":
        assert serve.model.name == f"{here}/adapters/mine/1"


def test_a_scaffold_that_can_not_be_written_is_one_clear_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("file").write_text("")
    assert "'file/mine' can't be written" in refused(capfd, *GIVEN, "--scaffold", "file/mine")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("my data.v2", "my-data.v2"), ("数据", "adapter"), ("数据-v2", "v2"), ("é" * 3, "adapter")],
)
def test_the_adapter_is_named_after_the_data(
    capfd: pytest.CaptureFixture[str], name: str, adapter: str
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(24)]
    path = Path(f"{name}.jsonl")
    path.write_text("\n".join(json.dumps(row) for row in rows))
    command = ["recommend", "model.name=tiny", f"data.path={path}", "--scaffold", "mine"]
    assert main(command) == 0
    train = load_config(Path("mine/train.yaml"), [])
    assert train.publish is not None and train.publish.name == adapter
    assert Path(train.data.path) == path.resolve()  # whatever directory the file is run from


# --- it runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrialRecord]:
    """The directory in which the first configuration of a scaffold was trained, and its trial."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(knowledge, "_reference", lambda: b"")
        given = (*GIVEN, LENGTH, "train.max_steps=2")
        assert main(["recommend", *given, "--scaffold", "mine"]) == 0
        assert main(["train", "mine/train.yaml", "--json"]) == 0
        with History.open(Storage.at(folder / "runs").history_url, create=False) as history:
            (record,) = history.trials()
    return folder, record


def test_the_first_configuration_trains_as_it_is(trained: tuple[Path, TrialRecord]) -> None:
    folder, record = trained
    assert record.status == "finished" and record.metrics["steps"] == 2
    train = load_config(folder / "mine" / "train.yaml", [])
    for section in ("model", "data", "method", "train"):
        assert record.spec[section] == train.model_dump(mode="json")[section]
    assert list((folder / "runs" / "adapters" / "pydocs").glob("*/adapter_model.safetensors"))


def test_it_rests_on_the_trials_that_the_history_has(
    trained: tuple[Path, TrialRecord], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = trained[1]
    url = f"sqlite:///{tmp_path / 'history.sqlite'}"
    best = RATES[3]
    with History.open(url) as history:
        for rate in RATES:
            for rank in (8, 16, 64):
                spec = json.loads(json.dumps(record.spec))
                spec["method"]["r"], spec["train"]["learning_rate"] = rank, rate
                loss = 3.0 + abs(RATES.index(rate) - 3) + rank / 1000
                history.put(
                    record.updated(
                        trial_id=f"made-{rate:g}-{rank}",
                        spec=spec,
                        metrics=record.metrics | {"eval_loss": loss, "base_eval_loss": 9.0},
                    )
                )
    given = (LENGTH, "train.max_steps=2", f"history={url}")
    answer = answered(capfd, *given)
    assert (answer["source"], answer["trials"]) == ("learned", 15)
    first = answer["choices"][0]
    assert first["config"]["train"]["learning_rate"] == pytest.approx(best, rel=0.01)
    assert first["method"] == "lora"
    for basis in first["trials"]:
        assert re.fullmatch(r"made-[\d.e-]+-\d+", basis["trial_id"])
        assert basis["summary"].startswith("lora learning_rate=")
        assert "tiny on pydocs: eval_loss " in basis["summary"]
        assert basis["reference"] is False
    # The scenario on the command line is the very one of the trial that it led to.
    assert first["trials"][0]["likeness"] == pytest.approx(1.0, abs=0.01)
    assert main(["recommend", *GIVEN, *given]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "Learned from 15 settings tried with 1 model of about this size, among 15 trials" in said


def test_what_trials_took_corrects_the_estimates(
    trained: tuple[Path, TrialRecord], capfd: pytest.CaptureFixture[str]
) -> None:
    record = trained[1]
    given = (LENGTH, "train.max_steps=2")
    without = answered(capfd, *given)["choices"][0]["predictions"]
    url = f"history={Storage.at(trained[0] / 'runs').history_url}"
    corrected = answered(capfd, *given, url)["choices"][0]["predictions"]
    peak = record.metrics["peak_memory_bytes"]
    assert corrected["memory_bytes"] != without["memory_bytes"]
    assert abs(corrected["memory_bytes"]["expected"] - peak) <= abs(
        without["memory_bytes"]["expected"] - peak
    )


if __name__ == "__main__":
    SCHEMA.write_text(schema(), encoding="utf-8")
