"""The demo data is real, balanced, gives nothing away, and is the same every time."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from rayfin.config import DataConfig
from rayfin.data import Corpus, load_corpus
from rayfin.data.pydocs import MODULES, pydocs_examples
from rayfin.errors import DataError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(DataConfig(path="pydocs"))


def test_size_and_balance(corpus: Corpus) -> None:
    answers = Counter(e.messages[-1]["content"] for e in corpus.train + corpus.eval)
    assert set(answers) == set(MODULES)
    assert 400 <= sum(answers.values()) <= 800
    assert max(answers.values()) <= 3 * min(answers.values())
    assert len({e.messages[-1]["content"] for e in corpus.eval}) >= len(MODULES) - 2


def test_questions_are_short_unique_and_do_not_hold_the_answer(corpus: Corpus) -> None:
    questions = [(e.messages[1]["content"], e.messages[2]["content"]) for e in corpus.train]
    assert len({question for question, _ in questions}) == len(questions)
    for question, module in questions:
        assert len(question) < 160
        assert not re.search(rf"\b{module}\b", question, re.IGNORECASE)


def test_same_where_other_libraries_patch_the_standard_library(corpus: Corpus) -> None:
    script = (
        "import inspect, logging, sys\n"
        "inspect.getfile.__doc__ = 'Patched by some library.'\n"
        "logging.Logger.warning_advice = lambda self: self\n"
        "logging.Logger.warning_advice.__doc__ = 'What some library added here.'\n"
        "import rayfin.data as d\n"
        "from rayfin.config import DataConfig\n"
        "print(d.load_corpus(DataConfig(path='pydocs')).digest)\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'unittest'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    command = [sys.executable, "-OO", "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [corpus.digest, "[]"]


def test_a_python_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pydocs_examples.cache_clear()
    monkeypatch.setattr(sys, "executable", "/absent/python")
    with pytest.raises(DataError, match="running '/absent/python', which failed"):
        pydocs_examples()


def test_a_python_without_docstrings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pydocs_examples.cache_clear()
    monkeypatch.setattr("rayfin.data.pydocs._sentences", dict)
    with pytest.raises(DataError, match="without them; use another Python"):
        pydocs_examples()
