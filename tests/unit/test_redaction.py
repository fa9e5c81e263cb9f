"""What is secret is nowhere in what rayfin shows or writes."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

from rayfin.cli import main
from rayfin.config import load_config, load_serve_config
from rayfin.errors import ConfigError, HistoryError, StorageError
from rayfin.evaluation import SweepOutcome, write_sweep_report
from rayfin.history import History, TrialRecord, now
from rayfin.history.connect import parse_url, shown_url, without_password
from rayfin.objects import ObjectPath
from rayfin.paths import Storage
from rayfin.redaction import redact, redact_url, redacted
from rayfin.tuning.plan import find_resumable, new_plan

SECRET = "hush"
TOKEN = "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
PG = "postgresql+psycopg://"
LIKE_TOKENS = [
    "sk-learn-instructions-v2.jsonl",
    "sk-Learn-Instructions-2024-v2.jsonl",
    "hf_instructiontuning2024.jsonl",
    "hf_instructiontuningofsmallmodels2024.jsonl",
]
URLS = [
    f"{PG}ann:{SECRET}@db/trials",
    f"{PG}ann:a%40{SECRET}%2Fb@db/trials",
    f"{PG}ann:a@{SECRET}/b?c@db/trials",  # nobody encoded it
    f"{PG}db/trials?user=ann&password={SECRET}",
    f"{PG}db/trials?user=ann&PassWord={SECRET}&sslmode=require",
    f"{PG}db/trials?pass%77ord={SECRET}",
    f"{PG}db/trials?password={SECRET}@x",
    f"{PG}ann@db/trials?password=two words {SECRET}&user=ann",
    f"{PG}ann@db/trials?sslpassword={SECRET}&sslkey=/keys/ann",
    f"{PG}ann@db/trials?options=-c%20app.secret%3D{SECRET}",
    f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/runs",
    f"s3://bucket/runs?region=eu&secret_key={SECRET}&access_key=AKIAIOSFODNN7EXAMPLE",
    f"https://bucket/x?X-Amz-Signature={SECRET}&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_loses_what_is_secret_and_nothing_else(url: str) -> None:
    text = redact_url(url)
    assert SECRET not in text and "AKIAIOSFODNN7EXAMPLE" not in text.replace("://AKIA", "")
    assert "***" in text and redact_url(text) == text == redact(text)
    for kept in ("sslmode=require", "region=eu", "sslkey=/keys/ann", "bucket", "user=ann"):
        assert (kept in url) == (kept in text)


@pytest.mark.parametrize("url", [url for url in URLS if " " not in url])
def test_in_the_midst_of_a_message_too(url: str) -> None:
    told = redact(f"history: '{url}' can't be used: it is down; mend that")
    assert SECRET not in told and told.endswith("' can't be used: it is down; mend that")


@pytest.mark.parametrize(
    "text",
    [
        f"invalid dsn: password={SECRET} host=db",
        f'{{"password": "{SECRET}"}}',
        f"Authorization: Bearer {SECRET}{SECRET}",
        f"Driver=x;UID=ann;PWD={SECRET}; credentials={SECRET}",
        f"can't reach {PG}ann@db/trials?pwd=/{SECRET}&x=1",
        f"401 for hf_{TOKEN}.",
        f"key sk-proj-{TOKEN}-_7 is revoked",
        f"https://ghp_{TOKEN}@github.example/a is gone",
    ],
)
def test_settings_headers_and_marked_tokens(text: str) -> None:
    assert SECRET not in redact(text) and TOKEN[:9] not in redact(text) and "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/runs?x/history.sqlite",
        "postgresql+psycopg://ann@db/trials?sslmode=require&passfile=/keys/pgpass",
        "check that the server runs, and the host, user, password and database of the URL",
        "api.api_keys: is missing; give it a value",
        "method.num_virtual_tokens=20, data.max_length=64 tokens, tokens/s=3",
        "its signature = f(x), key=value, token: a word, 3 passes=3",
        "credential_file=/etc/a, password_path='b c', PASSWORD_FILE: x",
        "PWD=/x OLDPWD=/tmp, pwd=~/run GOOGLE_APPLICATION_CREDENTIALS=/keys/a.json",
        '{"credentials": "/keys/a.json"}',
        "mail ann@example.org about https://example.org/a?b=c",
        "https://hub.example can't be reached: name: lookup of mail@x.org failed",
        *LIKE_TOKENS,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_tree_is_redacted_by_its_keys() -> None:
    tree = {"api": {"admin_token": SECRET, "api_keys": [{"key": SECRET}], "max_tokens": 4}}
    assert redacted(tree) == {
        "api": {"admin_token": "***", "api_keys": [{"key": "***"}], "max_tokens": 4}
    }


@pytest.mark.parametrize(
    "name", ["password", "pgpassword", "pwd", "passphrase", "client_secret", "aws_credential",
             "api_key", "APIKEY", "access_key", "accessKey", "admin_token"],
)  # fmt: skip
def test_a_message_and_a_tree_hide_the_same_names(name: str) -> None:
    assert redacted({name: SECRET}) == {name: "***"}
    assert redact(f"it has {name}={SECRET}, here") == f"it has {name}=***, here"


def test_a_secret_that_is_known_is_in_no_message() -> None:
    told = redact("FATAL: 'gYZ 7' is not ann's, nor 'other'", ["gYZ 7", ""])
    assert told == "FATAL: '***' is not ann's, nor 'other'"


def test_an_error_holds_none_wherever_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    error = pickle.loads(pickle.dumps(HistoryError(f"history: '{URLS[3]}' is down")))
    logging.getLogger("rayfin").warning("kept for later: %s", error)
    assert SECRET not in f"{error} {error!r} {error.args} {caplog.text}"


@pytest.mark.parametrize("url", [url for url in URLS if url.startswith(PG)])
def test_a_history_is_shown_and_kept_without(url: str) -> None:
    if "c@db" not in url and not url.endswith("@x"):  # those are no URLs at all
        parsed = parse_url(url)
        assert SECRET not in shown_url(parsed) and SECRET not in without_password(url)
    closed = url.replace("@db/", "@127.0.0.1:1/").replace("//db/", "//127.0.0.1:1/")
    with pytest.raises(HistoryError) as told:
        History.open(closed)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("url", URLS[:-3][3:4])
def test_a_sweep_writes_none_down_and_is_found_again(url: str, tmp_path: Path) -> None:
    settings = [f"history={url}", f"storage={tmp_path}", "sweep.parameters={method.r: [2]}"]
    config = load_config(None, settings)
    plan = new_plan(config, Storage.open(tmp_path))
    plan.save()
    row = TrialRecord(
        trial_id="t", sweep_id=plan.sweep_id, fingerprint="f", status="failed", created_at=now(),
        updated_at=now(), error=f"OSError: {url} is down",
    )  # fmt: skip
    assert SECRET not in row.model_dump_json()
    write_sweep_report(plan.location.path / "report.html", SweepOutcome([], config, None))
    for path in filter(Path.is_file, plan.location.path.rglob("*")):
        assert SECRET not in path.read_text(), path
    assert find_resumable(config, Storage.open(tmp_path)) == plan


@pytest.mark.parametrize("mark", list("'\"<> `"))
def test_a_password_of_any_marks_is_in_no_message(mark: str) -> None:
    secret = f"it{mark}s{SECRET}"
    for url in (
        f"mysql://ann:{secret}@db/x",
        f"{PG}ann:a@b{secret}@db/x",
        f"sqlite://ann:{secret}@db/x",
        f"ann:{secret}@db/x",
        f"host=db password={secret}",
    ):
        with pytest.raises(HistoryError) as told:
            parse_url(url)
        assert SECRET not in str(told.value) and "***" in str(told.value)
    for url in (f"ftp://ann:{secret}@bucket/x", f"s3://ann:{secret}@[x/y", f"s3://a:{secret}@b/#"):
        with pytest.raises(StorageError) as refused:
            ObjectPath.at(url)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("name", [*LIKE_TOKENS, f"sk-1{TOKEN}", "Basic instructions.jsonl"])
def test_a_sweep_over_a_file_named_as_a_token_is_found_again(name: str, tmp_path: Path) -> None:
    settings = [f"data.path={tmp_path / name}", f"storage={tmp_path}"]
    config = load_config(None, [*settings, "sweep.parameters={method.r: [2]}"])
    plan = new_plan(config, Storage.open(tmp_path))
    plan.save()
    assert find_resumable(config, Storage.open(tmp_path)) == plan


def test_a_bucket_takes_no_keys_in_its_url() -> None:
    for url in URLS[-3:-1]:
        with pytest.raises(StorageError, match="written into the history") as told:
            ObjectPath.at(url)
        assert SECRET not in str(told.value)


def test_commands_show_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{PG}127.0.0.1:1/trials?user=ann&password={SECRET}"
    for words in (
        ["doctor", f"storage=s3://ann:it's{SECRET}@bucket/runs", f"history={url}", "--json"],
        ["history", "list", f"history={url}"],
        ["sweep", f"history={url}", f"storage={tmp_path}"],
    ):
        assert main(words) in (1, 2), words
        out, err = capsys.readouterr()
        assert SECRET not in out + err and out + err, (words, out, err)


@pytest.mark.parametrize(
    "setting",
    [
        f"api.api_keys={{key: {SECRET}",
        f"api.api_keys=[{{key: {SECRET}, adapters: {SECRET}}}]",
    ],
)
def test_what_is_wrong_with_a_key_is_told_without_it(setting: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_serve_config(None, [setting])
    assert SECRET not in str(told.value) and setting.partition("=")[0] in str(told.value)
