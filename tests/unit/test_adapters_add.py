"""`rayfin adapters add`: an adapter from elsewhere is checked, copied and published, or isn't."""

import io
import json
import os
import shlex
import shutil
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import peft
import pytest

from rayfin.adapters import Registry, fetch
from rayfin.cli import main
from rayfin.config.schema import ModelConfig
from rayfin.models import load_base, locate

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SNAPSHOT = "/home/ray/hub/models--acme--tiny/snapshots/0f1e2d3c"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT wrote, of the bundled base."""
    directory = tmp_path_factory.mktemp("trained")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_base(ModelConfig(name="tiny"), None, "cpu"), settings)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


class Place:
    """A copy of the adapter, and a registry to add it to."""

    def __init__(self, trained: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.lora, self._capsys = root, root / "lora", capsys
        shutil.copytree(trained, self.lora)
        self.registry = Registry(root / "runs" / "adapters")

    def set(self, **values: object) -> None:
        config = self.lora / CONFIG
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    def add(self, source: object, *more: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        code = main(["adapters", "add", str(source), "support", f"storage={self.root}/runs", *more])
        told = self._capsys.readouterr()
        return code, told.out, told.err

    def refused(self, source: object, message: str, *more: str) -> None:
        code, out, err = self.add(source, *more)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
        assert self.registry.versions("support") == ()

    def packed(self, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
        path = self.root / "lora.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(self.lora.iterdir()):
                archive.write(file, f"lora/{file.name}")
            for name, content in entries:
                archive.writestr(name, content)
        return path


@pytest.fixture
def place(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    return Place(trained, tmp_path, capsys)


def test_a_directory_is_copied_whole_and_published(place: Place) -> None:
    (place.lora / "training_args.bin").write_bytes(b"pickle")
    (place.lora / "rayfin.json").write_text('{"base_model": "llama", "metrics": {"eval_loss": 0}}')
    code, out, err = place.add(place.lora, "--alias", "prod")
    assert code == 0 and out.startswith("support@1 is published (LORA; latest, prod)\n")
    assert "base model  tiny" in out and "rayfin chat --use support storage=" in out
    assert "training_args.bin" in err and "rayfin.json has no digests of these files" in err
    version = place.registry.verify("support@prod")
    assert version.base_model == "tiny" and "metrics" not in version.metadata
    assert version.metadata["base_identity"][0] == "tiny@1"
    assert {path.name for path in version.path.iterdir()} == {CONFIG, WEIGHTS, "rayfin.json"}

    # A version of another registry brings along what its publisher knew.
    other = f"storage={place.root}/other"
    assert main(["adapters", "add", str(version.path), "support", other]) == 0
    again = Registry(place.root / "other" / "adapters").resolve("support@1")
    assert again.metadata["base_identity"] == version.metadata["base_identity"]


def test_the_command_that_it_prints_talks_to_the_adapter(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the engine's defaults would refuse its rank, or the length of its base."""
    base = place.root / "its base"
    shutil.copytree(locate(ModelConfig(name="tiny")), base)
    sizes = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 256}
    (base / "config.json").write_text(json.dumps(sizes))
    settings = peft.LoraConfig(r=65, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_base(ModelConfig(name=str(base)), None, "cpu"), settings)
    wide = place.root / "wide"
    model.save_pretrained(str(wide), save_embedding_layers=False)
    (place.root / "served.yaml").write_text(f"model: {{name: {str(base)!r}}}")
    given = (f"{place.root}/served.yaml", "engine.max_rank=65", "api.admin_token=secret")
    code, out, err = place.add(wide, *given, "--base-is-right")
    assert code == 0, err
    command = shlex.split(out.splitlines()[-1].removeprefix("Talk to it: "))
    assert command[:2] == ["rayfin", "chat"] and "secret" not in out
    monkeypatch.setattr("sys.stdin", io.StringIO("/set max_tokens=2\nhello\n"))
    assert main([*command[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "support@1"


def test_what_is_there_already_makes_no_version(place: Place) -> None:
    (place.lora / "README.md").unlink()
    assert json.loads(place.add(place.lora, "--json")[1])["is_new"]
    code, out, err = place.add(place.packed(), "--alias", "prod")
    assert code == 0 and out.startswith("support@1 was published before (LORA; latest, prod)\n")
    assert err == "already there as support@1 (same content); no version was made\n"
    assert place.registry.versions("support") == (1,)
    # It is still held against the deployment that is to serve it.
    code, _, err = place.add(place.lora, "engine.max_rank=2")
    assert code == 2 and "adapter 'support': it has rank 4" in err
    # Other files, another word on the base, and a damaged version each make a new one.
    place.set(lora_alpha=2)
    assert json.loads(place.add(place.lora, "--json")[1])["ref"] == "support@2"
    place.set(base_model_name_or_path="/data/tiny")
    answered = ("model.name=tiny", "--base-is-right", "--json")
    assert json.loads(place.add(place.lora, *answered)[1])["ref"] == "support@3"
    assert not json.loads(place.add(place.lora, *answered)[1])["is_new"]
    weights = place.registry.resolve("support").path / WEIGHTS
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert json.loads(place.add(place.lora, *answered)[1])["ref"] == "support@4"


def test_a_name_whose_latest_version_has_another_base_is_told_of(place: Place) -> None:
    (place.lora / "README.md").unlink()
    other = place.root / "other"
    shutil.copytree(locate(ModelConfig(name="tiny")), other)
    config = json.loads((other / "config.json").read_text()) | {"rope_theta": 20_000.0}
    (other / "config.json").write_text(json.dumps(config))
    assert place.add(place.lora)[2] == ""
    code, _, err = place.add(place.lora, f"model.name={other}", "--base-is-right")
    assert code == 0 and err.count("\n") == 1
    assert f"'support' is support@2 from now on, whose base is '{other}' (local@" in err
    assert "and support@1 has 'tiny' (local@" in err and "rayfin adapters rm support@2" in err
    place.set(lora_alpha=2)
    answered = (f"model.name={other}", "--base-is-right")
    assert place.add(place.lora, *answered)[2] == "", "the same base as the one before it"


def test_a_zip_file_is_the_directory_in_it(place: Place) -> None:
    packed = place.packed(("lora/checkpoint-10/adapter_config.json", b"{}"), ("notes.txt", b""))
    code, out, err = place.add(packed, "--json")
    assert code == 0 and json.loads(out)["ref"] == "support@1" and "notes.txt" in err
    version = place.registry.verify("support")
    for name in (CONFIG, WEIGHTS):
        assert (version.path / name).read_bytes() == (place.lora / name).read_bytes()
    assert list((place.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("named", [SNAPSHOT, "acme/tiny", "/data/models/tiny/", None])
def test_the_user_may_answer_for_the_base(
    place: Place, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place.set(base_model_name_or_path=named)
    place.refused(place.lora, "--base-is-right")
    place.refused(place.lora, "--base-is-right model.name=tiny", "model.name=tiny")
    code, _, err = place.add(place.lora, "model.name=tiny", "--base-is-right")
    assert code == 0, err
    told = place.registry.resolve("support").metadata
    assert (told["base_model"], told["base_identity"][0]) == ("tiny", "tiny@1")


def test_the_shapes_must_fit_all_the_same(place: Place, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(locate(ModelConfig(name="tiny")), wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    message = "has shape [4, 64], and adapter_config.json and the served base ask for [4, 96]"
    place.refused(place.lora, message, f"model.name={wide}", "--base-is-right")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "the engine serves LORA"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": 128}, "raise engine.max_rank"),
        ({"invented_in_2030": True}, "'invented_in_2030'"),
        ({"rank_pattern": {r".*\.layers\.1\..*(q|k)$": 16}}, "write names of modules there"),
        ({"trainable_token_indices": [10, 11]}, "or merge the adapter into its base"),
        ({"init_lora_weights": "pissa"}, "save it as plain LoRA"),
    ],
)
def test_what_the_engine_would_answer_wrongly_is_refused(
    place: Place, change: dict[str, object], message: str
) -> None:
    place.set(**change)
    place.refused(place.lora, message)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
        {"bias": "lora_only"},
        {"task_type": None, "some_new_field": None},
    ],
)
def test_forms_that_others_write(place: Place, change: dict[str, object]) -> None:
    place.set(**change)
    assert place.add(place.lora)[0] == 0


def test_an_adapter_of_an_early_peft(place: Place) -> None:
    told = json.loads((place.lora / CONFIG).read_text())
    kept = ("base_model_name_or_path", "bias", "lora_alpha", "peft_type", "r", "target_modules")
    early = {key: told[key] for key in kept} | {"enable_lora": None, "merge_weights": False}
    (place.lora / CONFIG).write_text(json.dumps(early))
    assert place.add(place.lora)[0] == 0


def test_a_pickle_is_named_and_not_opened(place: Place) -> None:
    (place.lora / WEIGHTS).rename(place.lora / "adapter_model.bin")
    place.refused(place.lora, "save the adapter again with save_pretrained() (only safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/at/all", "is not there; give a directory"),
        ("acme/adapter", "nor to be had from the Hugging Face hub (Cannot reach"),
        ("lora.tar.gz", "no ZIP file and no directory; unpack it where you trust it"),
        ("trial", "give its adapter, "),
    ],
)
def test_sources_that_are_none(
    place: Place, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (place.root / "lora.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    shutil.copytree(place.lora, place.root / "trial" / "adapter")
    given = source if source == "acme/adapter" else place.root / source
    place.refused(given, message)


def test_a_copy_by_hand_is_told_of_with_the_remedy(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    hand = place.registry.root / "support"
    shutil.copytree(place.lora, hand)
    storage = f"storage={place.root}/runs"
    assert main(["adapters", "list", storage]) == 0
    remedy = (
        "copied into the registry by hand, and is not served; check and publish it with: "
        f"rayfin adapters add {hand} support"
    )
    assert remedy in capsys.readouterr().err
    assert main(["adapters", "show", "support", storage]) == 2
    assert remedy in capsys.readouterr().err
    assert place.add(hand)[0] == 0
    shutil.copytree(place.lora, hand / "7")
    assert main(["adapters", "list", storage]) == 0
    told = capsys.readouterr()
    assert "support@1" in told.out and "then remove it: rayfin adapters rm support@7" in told.err


# --- hostile ------------------------------------------------------------------------------------


def linked() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("lora/tokenizer.json")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        ("../sentinel", b"overwritten", "leads out of it, and nothing was unpacked"),
        ("lora/../../sentinel", b"overwritten", "leads out of it"),
        ("/sentinel", b"overwritten", "leads out of it"),
        ("C:\\sentinel", b"overwritten", "leads out of it"),
        ("lora\\..\\..\\sentinel", b"overwritten", "leads out of it"),
        (linked(), b"../../sentinel", "is a link or a device"),
        (f"lora/{CONFIG}", b"{}", "is there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_nothing_of_a_zip_file_gets_out(
    place: Place, entry: str | zipfile.ZipInfo, content: bytes, message: str
) -> None:
    sentinel = place.root / "sentinel"
    sentinel.write_text("untouched")
    place.refused(place.packed((entry, content)), message)
    assert sentinel.read_text() == "untouched"
    assert list((place.root / "tmp").iterdir()) == []
    assert {path.name for path in place.root.iterdir()} <= {"lora", "lora.zip", "sentinel", "tmp"}


def test_a_zip_bomb_is_refused_by_its_table_of_contents(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 2**20)
    packed = place.packed(("lora/tokenizer.json", bytes(2**21)))
    assert packed.stat().st_size < 2**16
    monkeypatch.setattr(fetch, "_copy", lambda *_: pytest.fail("something was unpacked"))
    place.refused(packed, "at most 1048576 are unpacked")


def test_a_zip_file_that_holds_more_than_it_announces(place: Place) -> None:
    packed = place.packed(("lora/tokenizer.json", b"x" * 5000))
    data = bytearray(packed.read_bytes())
    # Both headers say 10 bytes; the compressed data are 5000.
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.rfind(mark)
        assert data[at + offset : at + offset + 4] == struct.pack("<L", 5000)
        data[at + offset : at + offset + 4] = struct.pack("<L", 10)
    packed.write_bytes(data)
    place.refused(packed, "make or copy it again")


@pytest.mark.parametrize("what", ["entries", "table", "zip64"])
def test_a_table_of_contents_without_end(
    place: Place, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = place.packed(*((f"lora/x/{n}", b"") for n in range(300)))
    if what == "entries":
        monkeypatch.setattr(fetch, "MAX_ENTRIES", 100)
        place.refused(packed, "entries; at most 100 are read")
        return
    monkeypatch.setattr(fetch, "MAX_TABLE_BYTES", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the table was read"))
    if what == "zip64":
        data = packed.read_bytes()
        end64 = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 300, 300, 10**6, 0)
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, len(data) - 22, 1)
        end = data[-22:-10] + struct.pack("<LL", 0xFFFFFFFF, 0xFFFFFFFF) + b"\0\0"
        packed.write_bytes(data[:-22] + end64 + locator + end)
    place.refused(packed, "and at most 1000 are read")


def test_a_json_file_that_would_fill_the_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = b'{"peft_type": "LORA", "x": [' + b"0," * (9 * 2**20) + b"0]}"
    (place.lora / CONFIG).write_bytes(bomb)
    place.refused(place.lora, f"{CONFIG}' has {len(bomb)} bytes; at most 16777216 are read")
    packed = place.packed()
    assert packed.stat().st_size < 2**18
    monkeypatch.setattr(fetch, "_copy", lambda *_: pytest.fail("something was unpacked"))
    place.refused(packed, f"would unpack to {len(bomb)} bytes; at most 16777216 are read")


@pytest.mark.parametrize("kind", ["deflate", "lzma", "name", "offset"])
def test_a_zip_file_that_is_not_as_its_headers_say(place: Place, kind: str) -> None:
    """Each raises another kind of error where it is read."""
    method = zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_DEFLATED
    path, data = place.root / "lora.zip", bytearray()
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(place.lora / CONFIG, CONFIG)
        archive.write(place.lora / WEIGHTS, WEIGHTS)
    data[:] = path.read_bytes()
    if kind in ("deflate", "lzma"):
        start = 30 + len(CONFIG) + (9 if kind == "lzma" else 0)
        data[start : start + 40] = b"\xff" * 40
    elif kind == "name":
        at = data.rfind(b"PK\x01\x02")
        data[at + 9] |= 0x08  # the name is UTF-8
        data[at + 46] = 0xFF
    else:
        at = data.find(b"PK\x01\x02")
        data[at + 42 : at + 46] = struct.pack("<L", 0xFFFFFFFF)
        extra = struct.pack("<HHQ", 1, 8, 2**63 + 5)
        data[at + 30 : at + 32] = struct.pack("<H", len(extra))
        name_end = at + 46 + len(CONFIG)
        data[name_end:name_end] = extra
        size = struct.unpack_from("<L", data, len(data) - 10)[0]
        struct.pack_into("<L", data, len(data) - 10, size + len(extra))
    path.write_bytes(data)
    place.refused(path, f"'{path}' ")


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-is-called-so/x"])
def test_a_source_that_can_be_no_path(place: Place, source: str) -> None:
    place.refused(source, "give a directory with adapter_config.json, a ZIP file")


@pytest.mark.parametrize("folder", ["./", "./lora/", ".//lora//"])
def test_a_zip_file_whose_names_begin_with_a_dot(place: Place, folder: str) -> None:
    path = place.root / "dots.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./", b"")
        for file in sorted(place.lora.iterdir()):
            archive.writestr(folder + file.name, file.read_bytes())
    assert place.add(path)[0] == 0
    assert (place.registry.resolve("support").path / WEIGHTS).exists()


def test_a_name_in_the_output_for_machines_steers_no_terminal(place: Place) -> None:
    steering = place.lora.rename(place.root / "lora\x9b31m\u202e")
    code, out, err = place.add(steering, "--json")
    assert code == 0, err
    assert json.loads(out)["metadata"]["source"] == str(steering)
    assert "\x9b" not in out and "\u202e" not in out


def test_a_zip_file_that_is_cut_short(place: Place) -> None:
    packed = place.packed()
    data = packed.read_bytes()
    for damaged in (data[: len(data) // 2], data[:-30] + data[-22:]):
        packed.write_bytes(damaged)
        code, _, err = place.add(packed)
        assert code == 2 and "ZIP file" in err


def test_a_hard_link_to_a_file_outside_is_refused(place: Place) -> None:
    outside = place.root / "outside.json"
    outside.write_text('{"secret": 1}')
    os.link(outside, place.lora / "tokenizer_config.json")
    before = outside.stat()
    place.refused(place.lora, "is a hard link: the same file has a name outside")
    (place.lora / "tokenizer_config.json").unlink()
    os.link(place.lora / CONFIG, place.lora / "config-again.json")  # both names are inside
    assert place.add(place.lora)[0] == 0
    after = outside.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert outside.read_text() == '{"secret": 1}'
    assert (place.registry.resolve("support").path / CONFIG).stat().st_nlink == 1


def test_a_regular_expression_without_end_is_not_matched(place: Place) -> None:
    """PEFT would match it with every module's name; the tensors' own names say what is adapted."""
    place.set(target_modules="(.*)*" * 20 + "(a|a|.)*!$", exclude_modules="((.*)*)*!")
    assert place.add(place.lora)[0] == 0


@pytest.fixture
def leaves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """Writes a module that leaves a file where it is imported; returns that file."""

    def write(directory: Path, name: str) -> Path:
        trace = tmp_path / f"{name}-ran"
        (directory / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
        monkeypatch.syspath_prepend(directory)
        return trace

    return write


def test_modules_that_an_adapter_names_are_not_imported(
    place: Place, leaves_a_trace: Callable[[Path, str], Path]
) -> None:
    """auto_mapping is what AutoPeftModel imports; auto_map is transformers'."""
    traces = [leaves_a_trace(place.lora, name) for name in ("evil_parent", "evil_tokenizer")]
    place.set(
        auto_mapping={"base_model_class": "Model", "parent_library": "evil_parent"},
        megatron_core="evil_parent",
    )
    auto_map = {"AutoTokenizer": ["evil_tokenizer.Tokenizer", None]}
    settings = {"tokenizer_class": "Tokenizer", "auto_map": auto_map}
    (place.lora / "tokenizer_config.json").write_text(json.dumps(settings))
    assert place.add(place.lora)[0] == 0
    version = place.registry.resolve("support")
    assert not any(path.suffix == ".py" for path in version.path.iterdir())
    assert not any(trace.exists() for trace in traces)
    assert not {"evil_parent", "evil_tokenizer"} & set(sys.modules)


def test_a_base_with_code_of_its_own_is_not_run(
    place: Place, tmp_path: Path, leaves_a_trace: Callable[[Path, str], Path]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(locate(ModelConfig(name="tiny")), base)
    traces = [leaves_a_trace(base, name) for name in ("evil_model", "evil_words")]
    for name, auto_map in (
        (
            "config.json",
            {"AutoConfig": "evil_model.Config", "AutoModelForCausalLM": "evil_model.Model"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil_words.Slow", "evil_words.Fast"]}),
    ):
        file = base / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    assert place.add(place.lora, f"model.name={base}", "--base-is-right")[0] == 0
    load_base(ModelConfig(name=str(base)), None, "cpu")
    unknown = json.loads((base / "config.json").read_text()) | {"model_type": "evil"}
    (base / "config.json").write_text(json.dumps(unknown))
    code, _, err = place.add(place.lora, f"model.name={base}", "--base-is-right")
    assert code == 2 and "code that comes with a model is never run" in err
    assert not any(trace.exists() for trace in traces)


def header(tensors: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_weights_with_a_hundred_thousand_tensors_or_overlapping_ones(place: Place) -> None:
    weights = place.lora / WEIGHTS
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    weights.write_bytes(header({f"t{n}": empty for n in range(100_000)}, b""))
    place.refused(place.lora, "the engine does not serve the tensor 't0'")
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    two = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
    weights.write_bytes(header({"a": one, "b": two}, bytes(24)))
    place.refused(place.lora, "is not a whole safetensors file")
    weights.write_bytes(header({"a": one, "b": one}, bytes(16)))
    place.refused(place.lora, "is not a whole safetensors file")
