"""The demo data is real, balanced, gives nothing away, and is the same every time."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from rayfin.config import DataConfig
from rayfin.data import Corpus, load_corpus
from rayfin.data.pydocs import MODULES


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


def test_same_in_every_process_without_warnings_or_heavy_imports(corpus: Corpus) -> None:
    script = (
        "import sys, rayfin.data as d; from rayfin.config import DataConfig; "
        "print(d.load_corpus(DataConfig(path='pydocs')).digest); "
        "print(sorted({'torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'tkinter'} "
        "& set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [corpus.digest, "[]"]


def test_python_without_docstrings_says_so() -> None:
    script = (
        "import rayfin.data.pydocs as p\ntry: p.pydocs_examples()\nexcept Exception as e: print(e)"
    )
    run = subprocess.run(
        [sys.executable, "-OO", "-c", script], capture_output=True, text=True, check=True
    )
    assert "run it without -OO" in run.stdout
