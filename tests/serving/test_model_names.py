"""Who answers to a name: never another than the one that is named."""

import builtins
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import AdapterRef, Registry
from rayfin.errors import AdapterError, AdapterNotFound, ConfigError
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.model_names import MAX_AGE, ModelNames
from rayfin.serving.public_messages import PublicMessages

BASE = "HuggingFaceTB/SmolLM2-135M"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trained(tiny_adapters: dict[str, AdapterSource]) -> Path:
    return tiny_adapters["lora"].path


@pytest.fixture
def registry(tmp_path: Path, trained: Path) -> Registry:
    """support@1 (prod), support@2, and sales@1."""
    registry = Registry(tmp_path / "adapters")
    registry.publish("support", trained, alias="prod")
    registry.publish("support", trained)
    registry.publish("sales", trained)
    return registry


@pytest.fixture
def names(registry: Registry, clock: Clock) -> ModelNames:
    return ModelNames(registry, BASE, clock)


@pytest.mark.parametrize("prefix", ["", f"{BASE}:"])
@pytest.mark.parametrize(
    ("model", "answers"),
    [
        ("support", "support@2"),
        ("support@latest", "support@2"),
        ("support@1", "support@1"),
        ("support@prod", "support@1"),
        ("sales", "sales@1"),
    ],
)
def test_a_name_is_one_version(names: ModelNames, prefix: str, model: str, answers: str) -> None:
    named = names.resolve(prefix + model)
    assert named.answer_name == answers
    assert named.source is not None and named.version is not None
    assert named.source.ref == named.version.ref == answers
    assert named.source.path == names.catalog.root / answers.replace("@", "/")


def test_an_adapter_that_is_called_as_the_base_is_refused_with_the_remedy(
    registry: Registry, trained: Path, tiny: str
) -> None:
    names = ModelNames(registry, "tiny")
    registry.publish("tiny", tiny)  # the base itself, as a full fine-tune is served
    names.check()
    registry.publish("tiny", trained)
    registry.publish("tiny", trained, alias="prod")
    with pytest.raises(ConfigError, match=r"called 'tiny', as adapter 'tiny@2' is; set depl"):
        names.check()
    # One that was published later: its name stays the base's, and it is told.
    assert names.resolve("tiny").source is None
    for model in ("tiny@2", "tiny@prod", "tiny:tiny"):
        with pytest.raises(AdapterNotFound, match=r"set deployment\.served_model_name"):
            names.resolve(model)
    listing = names.list()
    assert {named.adapter for named in listing.served} == {"sales", "support"}
    refused = {version.ref: refusal.what for version, refusal in listing.refused.items()}
    assert refused == {"tiny@3": "called as the base is"}
    ModelNames(registry, BASE).check()


def test_an_unknown_name_costs_no_walk_for_what_was_copied_in_by_hand(
    names: ModelNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walks(self: Registry) -> dict[str, str]:
        raise AssertionError("all of the registry was walked")

    monkeypatch.setattr(Registry, "unpublished_copies", walks)
    with pytest.raises(AdapterNotFound, match="is not served here"):
        names.resolve("missing")
    assert len(names.list().served) == 3


def test_many_who_list_at_once_walk_once(
    names: ModelNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a walk that takes longer than what it finds is remembered is remembered all the same."""
    walks, entered = [], threading.Barrier(4)
    whole = Registry.list

    def slow(self: Registry) -> Any:
        walks.append(threading.get_ident())
        names._clock.now += 10 * MAX_AGE  # type: ignore[attr-defined]
        return whole(self)

    monkeypatch.setattr(Registry, "list", slow)

    def ask() -> int:
        entered.wait()
        return len(names.list().served)

    with ThreadPoolExecutor(4) as pool:
        assert [each.result() for each in [pool.submit(ask) for _ in range(4)]] == [3] * 4
    assert len(walks) == 1


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("suport", "did you mean 'support'"),
        (f"{BASE}:suport", "did you mean 'support'"),
        ("support@3", "it has 1, 2"),
        ("support@prd", "did you mean 'prod'"),
        ("gpt-4:support", f"use '{BASE}:support'"),
        (f"{BASE}:{BASE}:support", "asks for base"),
        ("gpt-4", "/v1/models"),
        (BASE.lower(), "neither the base"),
        ("", "neither the base"),
        (f"{BASE}:", "neither the base"),
    ],
)
def test_what_is_not_there_is_not_found(names: ModelNames, model: str, hint: str) -> None:
    with pytest.raises(AdapterNotFound, match=hint):
        names.resolve(model)
    assert names.held(f"{BASE}:sales") is None


def test_a_name_that_was_just_removed_is_no_suggestion_for_itself(
    names: ModelNames, registry: Registry
) -> None:
    with pytest.raises(AdapterNotFound):
        names.resolve("unlike")  # all names are known from here on, for a while
    registry.remove(AdapterRef("sales", version=1))
    with pytest.raises(AdapterNotFound) as missing:
        names.resolve("sales", anew=True)
    assert "did you mean" not in str(missing.value)


HOSTILE = [
    "../support",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "support/1",
    "support/../sales",
    "support@../1",
    "support@1/..",
    "..\\support",
    "%2e%2e%2fsupport",
    "support%00",
    "support\x00",
    "support\n",
    "support@1\n",
    ".hidden",
    "support@0",
    "support@01",
    "support@" + "9" * 5000,
    "a" * 100_000,
    f"{BASE}:../support",
    "süpport",
    "\ud800",
]


@contextmanager
def watching() -> Iterator[list[Any]]:
    """Notes every file and directory that is opened, listed or looked at."""
    touched: list[Any] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            touched.append(arguments)
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", noting(open))
        patch.setattr(io, "open", noting(io.open))
        for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
            patch.setattr(os, name, noting(getattr(os, name)))
        yield touched


@pytest.mark.parametrize("model", HOSTILE, ids=lambda model: ascii(model)[:30])
def test_hostile_names_touch_no_file(names: ModelNames, model: str) -> None:
    with watching() as touched, pytest.raises(AdapterNotFound) as refused:
        names.resolve(model)
    assert touched == []
    assert len(str(refused.value)) < 500


def test_links_out_of_the_registry_are_not_followed(
    names: ModelNames, registry: Registry, trained: Path
) -> None:
    (registry.root / "linked").symlink_to(registry.root / "support")
    (registry.root / "sales" / "2").symlink_to(registry.root / "support" / "1")
    with pytest.raises(AdapterError):
        names.resolve("linked")
    assert names.resolve("sales").answer_name == "sales@1"
    with pytest.raises(AdapterNotFound):
        names.resolve("sales@2")


def test_a_full_fine_tune_is_refused_with_the_reason(
    registry: Registry, names: ModelNames, tiny: str
) -> None:
    registry.publish("whole", tiny)
    with pytest.raises(AdapterError, match="a whole model") as refused:
        names.resolve("whole")
    assert not isinstance(refused.value, AdapterNotFound)
    assert "whole" not in {named.adapter for named in names.list().served}


def test_a_damaged_version_is_an_error_and_not_another_answer(
    registry: Registry, names: ModelNames
) -> None:
    metadata = registry.root / "support" / "2" / "rayfin.json"
    metadata.chmod(0o644)
    metadata.write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        names.resolve("support")
    assert names.resolve("support@1").answer_name == "support@1"


def test_the_registry_is_followed_within_a_second(
    registry: Registry, names: ModelNames, clock: Clock, trained: Path
) -> None:
    assert names.resolve("support").answer_name == "support@2"
    assert names.resolve("support@prod").answer_name == "support@1"
    registry.publish("support", trained, alias="prod")
    assert names.resolve("support").answer_name == "support@2"  # not looked at again yet
    clock.now += MAX_AGE
    assert names.resolve("support").answer_name == "support@3"
    assert names.resolve("support@prod").answer_name == "support@3"
    registry.rollback("support")
    registry.remove("support@3")
    clock.now += MAX_AGE
    assert names.resolve("support").answer_name == "support@2"
    assert names.resolve("support@prod").answer_name == "support@1"


def test_a_new_adapter_is_found_at_once_however_often_it_was_missed(
    registry: Registry, names: ModelNames, trained: Path
) -> None:
    with pytest.raises(AdapterNotFound):
        names.resolve("fresh")
    registry.publish("fresh", trained)
    assert names.resolve("fresh").answer_name == "fresh@1"


def test_anew_looks_past_what_is_remembered(registry: Registry, names: ModelNames) -> None:
    assert names.resolve("support").answer_name == "support@2"
    registry.remove("support@2")
    assert names.resolve("support", anew=True).answer_name == "support@1"
    assert names.resolve("support").answer_name == "support@1"


def test_many_requests_look_once(names: ModelNames) -> None:
    with watching() as touched:
        names.resolve("support")
        names.resolve("sales@1")
    assert touched
    with watching() as touched:
        for _ in range(1000):
            names.resolve("support")
            names.resolve("sales@1")
    assert touched == []
    # Neither do misses look at every adapter there is, once that was done for the hint.
    with pytest.raises(AdapterNotFound):
        names.resolve("missing")
    with watching() as touched:
        for number in range(1000):
            with pytest.raises(AdapterNotFound):
                names.resolve(f"missing-{number}")
    assert len(touched) <= 4 * 1000


def test_the_list_has_latest_versions_and_aliases(names: ModelNames) -> None:
    listed = {named.answer_name: named.version for named in names.list().served}
    assert list(listed) == ["sales@1", "support@1", "support@2"]
    assert [version.aliases for version in listed.values() if version is not None] == [
        ("latest",),
        ("prod",),
        ("latest",),
    ]


def test_an_alias_whose_version_is_gone_is_said_as_such(
    registry: Registry, names: ModelNames
) -> None:
    aliases = registry.root / "support" / "aliases.json"
    written = json.loads(aliases.read_text())
    aliases.write_text(json.dumps(written).replace(": 1", ": 7"))
    with pytest.raises(AdapterNotFound, match=r"alias 'prod' .* points to version 7, .* promote"):
        names.resolve("support@prod")
    with pytest.raises(AdapterNotFound, match="has no alias 'pord'"):
        names.resolve("support@pord")


def test_a_flood_of_unknown_names_is_not_remembered(
    registry: Registry, names: ModelNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfin.serving.model_names._MAX_REMEMBERED", 2)
    for number in range(500):
        with pytest.raises(AdapterNotFound):
            names.resolve(f"unknown-{number}")
        with pytest.raises(AdapterNotFound):
            names.resolve(f"support@{number + 100}")
    assert len(names._held) == 0, "an unknown name takes no memory"
    # What exists is remembered, no more of it than there is room for.
    for model in ("support", "support@1", "support@prod", "support@latest") * 3:
        assert names.resolve(model).adapter == "support"
        assert len(names._held) <= 2


def test_messages_for_clients_do_not_say_where_the_registry_is(
    registry: Registry, names: ModelNames
) -> None:
    (registry.root / "support" / "aliases.json").write_text("{")
    with pytest.raises(AdapterError) as refused:
        names.resolve("support")
    assert str(registry.root) in str(refused.value)
    assert str(registry.root.parent) not in names.public(str(refused.value))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "adapter 'a@1': it was trained on '/data/me/u-full/1' (local@1f), and the served base "
            "is 'BASE' (local@2e); serve it so (model.name=BASE), or publish it with: rayfin "
            "adapters add DIR NAME --base-is-right model.name=BASE",
            "adapter 'a@1': it was trained on 'u-full' (local@1f), and the served base is 'public' "
            "(local@2e); REMEDY",
        ),
        ("its base '/h/models--acme--small/snapshots/0f1e/' is", "its base 'acme/small' is"),
        ("trained on '/very/long/pa…, and", "trained on 'pa…, and"),
        ("'ROOT/red/1/x.json' has no r; add it again", "'red/1/x.json' has no r; add it again"),
        ("[Errno 5] Input/output error: /mnt/d/x, ~/.c/y", "[Errno 5] Input/output error: x, y"),
        ("on './models/u' and '~/u'; GET /v1/models has", "on 'u' and 'u'; GET /v1/models has"),
        ("its rank is 8/2, and it takes n/a", "its rank is 8/2, and it takes n/a"),
    ],
)  # fmt: skip
def test_clients_are_told_names_and_the_log_the_rest(
    tmp_path: Path, text: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, root = tmp_path / "bases" / "base", tmp_path / "adapters"
    public = PublicMessages({str(base): "public", str(root): ""})
    full = text.replace("BASE", str(base)).replace("ROOT", str(root))
    remedy = "whoever runs the server finds the remedy in its log"
    for _ in range(2):
        assert public(full) == told.replace("REMEDY", remedy)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ([f"in full, for whoever runs this server: {full}"] if full != told else [])


def test_the_log_of_refusals_is_bounded_and_steers_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfin.serving.public_messages._MOST", 4)
    public = PublicMessages({})
    for number in range(100):
        public(f"'/x/{number}a\x1b[31m' is damaged")
        assert len(public._logged) <= 4
    assert "\x1b" not in caplog.text


def test_a_directory_that_was_copied_in_by_hand_is_not_found_with_the_remedy(
    registry: Registry, names: ModelNames
) -> None:
    hand = registry.root / "by-hand"
    hand.mkdir()
    (hand / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterNotFound, match=r"by hand, and is not served; whoever runs"):
        names.resolve("by-hand")
