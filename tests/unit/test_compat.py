"""What rayfin uses of other packages' private interfaces: in one place, and where it expects it."""

from __future__ import annotations

import ast
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata, reload
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

import rayfin
from rayfin import compat
from rayfin.cli import main
from rayfin.compat.bitsandbytes import import_bitsandbytes
from rayfin.compat.private import PrivateName
from rayfin.compat.versions import TRAINS_WITH, check_trainer
from rayfin.errors import DependencyError
from rayfin.history import History
from rayfin.tuning.local_ray import local_ray

# By the packages themselves, as they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

SOURCE = Path(rayfin.__file__).parent
REMEDY = "declare it in rayfin/compat, and call a function there"

# Private names of Python's own in use: documented ones, and argparse's, which has no others.
PYTHONS = {"_exit", "_current_frames", "_replace", "_asdict"}
PYTHONS |= {"_SubParsersAction", "_actions", "_check_value", "_typeshed"}
# Names with two underscores before and behind that are public: Python's, and pydantic's own one.
DUNDERS = {n for kind in (type, list, dict, ModuleType, Exception, type(print)) for n in dir(kind)}
DUNDERS |= {"__future__", "__main__", "__version__", "__file__", "__path__", "__class_vars__"}
# What Python documents as there to be assigned to.
ASSIGNED = ("sys.stdout", "os.environ")


def private_names() -> Iterator[PrivateName]:
    for module in pkgutil.iter_modules(compat.__path__, f"{compat.__name__}."):
        for value in vars(import_module(module.name)).values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, PrivateName):
                    yield one


def test_private_names_are_where_rayfin_uses_them() -> None:
    """After an upgrade: mend the modules of `rayfin.compat` that the messages name."""
    import_bitsandbytes()
    moved = []
    for name in dict.fromkeys(private_names()):
        try:
            name.check()
        except DependencyError as error:
            moved.append(str(error))
    assert moved == []


def test_a_name_that_moved_is_told_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.services.ConsolePopen")
    with pytest.raises(DependencyError) as told, local_ray(1):
        pass
    assert f"ray {version('ray')} has no ray._private.services.ConsolePopen" in str(told.value)
    assert "needs to start Ray's processes in sessions of their own" in str(told.value)
    assert "(see rayfin/compat/ray.py); run: pip install 'ray[serve,train,tune]" in str(told.value)
    from ray._private import parameter

    assert isinstance(parameter.RayParams, type)  # what had been replaced by then is back


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda self, model: None, "has other parameters (model) for transformers.Trainer._save"),
        (None, "has no transformers.Trainer._save_checkpoint"),
    ],
)
def test_a_step_of_trainer_that_changed_is_told(
    monkeypatch: pytest.MonkeyPatch, found: Any, words: str
) -> None:
    from transformers import Trainer

    from rayfin.compat.transformers import STEPS

    if found is None:
        monkeypatch.delattr(Trainer, "_save_checkpoint")
    else:
        monkeypatch.setattr(Trainer, "_save_checkpoint", found)
    (step,) = [step for step in STEPS if step.name == "Trainer._save_checkpoint"]
    with pytest.raises(DependencyError, match=re.escape(words)):
        step.check()


def test_an_attribute_that_objects_no_longer_have_is_told() -> None:
    name = PrivateName(
        "rayfin.compat.ray_tune",
        "ray.tune.schedulers.async_hyperband",
        "AsyncHyperBandScheduler._no_such_brackets",
        needed_to="resume",
        instead="a public one",
        on_instances=True,
    )
    with pytest.raises(DependencyError, match=r"has no .*_no_such_brackets, which rayfin needs to"):
        name.check()
    with pytest.raises(DependencyError, match=r"has no .*_no_such_brackets"):
        name.of(object())


def test_what_a_package_lacks_for_its_import_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name "moved" only where the package can be imported and has none."""
    (tmp_path / "needs_cuda.py").write_text(
        "raise ImportError('libcudart.so.12: cannot open shared object file')"
    )
    (tmp_path / "needs_other.py").write_text("import no_such_other_package")
    (tmp_path / "is_there").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def told(module: str) -> str:
        with pytest.raises(DependencyError) as error:
            PrivateName("rayfin.compat.x", module, "name", needed_to="run", instead="none").get()
        return str(error.value)

    reason = "libcudart.so.12: cannot open shared object file"
    assert f"can't be imported ({reason})" in told("needs_cuda")
    assert "can't be imported (No module named 'no_such_other_package')" in told("needs_other")
    assert "has no is_there.moved.within.name, which" in told("is_there.moved.within")


def test_a_transformers_that_only_serves_is_refused_before_a_sweep_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import rayfin.compat.transformers as trainer

    found = {"transformers": "5.22.1"}
    monkeypatch.setattr(metadata, "version", lambda name: found.get(name) or version(name))
    told = "transformers 5.22.1 is enough to serve, but training needs 5.23; run"
    with pytest.raises(DependencyError, match=re.escape(told)):
        reload(trainer)
    storage = tmp_path / "storage"
    settings = [f"storage={storage}", "model.name=tiny", "sweep.parameters={method.r: [2]}"]
    assert main(["sweep", *settings]) == 2
    assert told in capsys.readouterr().err
    assert [*storage.rglob("sweep-*")] == []
    with History.open(f"sqlite:///{storage}/history.sqlite") as history:
        assert history.trials() == []
    found["transformers"] = "5.23.0.dev0"
    check_trainer()


def test_public_names_of_the_trainer_s_steps_are_not_trainer_s_own() -> None:
    from transformers import Trainer

    from rayfin.compat.transformers import SteppedTrainer

    added = {name for name in vars(SteppedTrainer) if not name.startswith("_")} - {"save_model"}
    assert added and [name for name in added if hasattr(Trainer, name)] == []


# --- the versions that were tested ------------------------------------------------------------

# Versions that run beside those of constraints.txt: vLLM's, and what it brings instead.
ALSO_RUN = {"vllm": "0.32", "transformers": "5.19", "fastapi": "0.136"}
# Who has a newer version of what keeps secrets is not sent back to an older one.
NO_LAST = {"cryptography"}


def test_ranges_begin_and_end_with_what_was_tested() -> None:
    root = SOURCE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    tested = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert ".".join(map(str, TRAINS_WITH)) == tested["transformers"].rpartition(".")[0]
    private = {name.package.replace("_", "-") for name in private_names()}
    every = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert private - {Requirement(line).name for line in every} == set()
    for requirement in map(Requirement, every):
        name = requirement.name.lower()
        bounds = {bound.operator: bound.version for bound in requirement.specifier}
        pin = tested.get(name, ALSO_RUN.get(name, ""))
        major, minor = pin.split(".")[:2]
        floor = ALSO_RUN.get(name, f"{major}.{minor}")
        ends = {f"{major}.{int(minor) + 1}"} | (set() if name in private else {str(int(major) + 1)})
        assert bounds[">="] == floor, f"{requirement}: {floor} is what was run"
        if name in NO_LAST:
            assert "<" not in bounds, f"{requirement}: it has no upper bound"
            continue
        assert bounds["<"] in ends, f"{requirement}: what was run ends before {' or '.join(ends)}"


# --- no private use elsewhere -----------------------------------------------------------------


def test_private_names_of_others_are_used_in_compat_alone() -> None:
    found = [
        f"{path.relative_to(SOURCE.parent)}:{line}: {text}: {REMEDY}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name != "compat"
        for line, text in private_uses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import ray._private.worker",
        "from ray._private import worker",
        "from ray.train.torch.config import _TorchBackend",
        "import ray\nray._private.state",
        "def f(asha):\n    asha._brackets[0]",
        "import torch\ntorch.compile = print",
        "import torch\nsetattr(torch, 'compile', print)",
        "from uvicorn.config import HTTP_PROTOCOLS\nHTTP_PROTOCOLS['auto'] = 'x'",
        "import deepspeed\ndeepspeed.ops.__compatible_ops__",
        "from ray import serve\nserve.delete('x', _blocking=False)",
        "def f(trainer):\n    getattr(trainer, '_save_checkpoint')",
        "import logging\nlogging.getLogger('bitsandbytes.autograd._functions')",
        "from transformers import Trainer\nclass T(Trainer):\n    def _save_checkpoint(self): ...",
        "from rayfin.compat.transformers import SteppedTrainer\n"
        "class T(SteppedTrainer):\n    def f(self):\n        super()._save_checkpoint()",
    ],
)
def test_a_private_use_is_found(code: str) -> None:
    assert [*private_uses(ast.parse(code))] != []


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each use of something that is private to another package or module."""
    imported = dict(imports(tree))
    foreign = {n for n, path in imported.items() if path.partition(".")[0] not in OURS}
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and of_self(n)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}  # fields of classes
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for name in (alias.name for alias in node.names):
                if any(map(is_private, f"{module}.{name}".split("."))):
                    yield line, f"import {module}.{name}"
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not of_self(node):
            if node.attr not in own or root(node) in foreign:
                yield line, ast.unparse(node)
        elif isinstance(node, ast.Call):
            for text in called_with(node):
                if any(is_private(name) for name in text.split(".") if name not in own):
                    yield line, f"{ast.unparse(node.func)}(... {text} ...)"
            if root(node.func) in ("setattr", "delattr") and root(node.args[0]) in foreign:
                yield line, ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            yield from inherited(node, imported)
        for target in assigned(node):
            if root(target) in foreign and not ast.unparse(target).startswith(ASSIGNED):
                yield line, f"{ast.unparse(target)} = ..."


OURS = ("rayfin", "__future__")


def is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and name not in PYTHONS and not (dunder and name in DUNDERS)


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """A name that an import has given a file, and the full name of what was imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def of_self(node: ast.Attribute) -> bool:
    return root(node.value) in ("self", "cls", "super") and not isinstance(
        node.value, ast.Attribute | ast.Subscript
    )


def root(node: ast.AST) -> str:
    """The name with which an expression such as `a.b[0].c()` begins."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def assigned(node: ast.AST) -> list[ast.expr]:
    """Attributes and items that a statement assigns to or deletes."""
    every: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        every = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        every = [node.target]
    flat = [e for t in every for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [target for target in flat if isinstance(target, ast.Attribute | ast.Subscript)]


def called_with(node: ast.Call) -> Iterator[str]:
    """Keywords of a call, and texts that name an attribute or a module."""
    yield from (keyword.arg for keyword in node.keywords if keyword.arg)
    if ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr", "logging.getLogger"):
        for argument in node.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def inherited(node: ast.ClassDef, imported: dict[str, str]) -> Iterator[tuple[int, str]]:
    """What a class overrides or uses of the private parts of a class of another package."""
    own = [(n.lineno, n.name) for n in node.body if isinstance(n, ast.FunctionDef)]
    used = [
        (n.lineno, n.attr) for n in ast.walk(node) if isinstance(n, ast.Attribute) and of_self(n)
    ]
    private = [(line, name) for line, name in own + used if is_private(name)]
    for base in node.bases if private else ():
        path = imported.get(root(base), "rayfin")
        if path.partition(".")[0] in OURS and not path.startswith("rayfin.compat."):
            continue
        rest = ast.unparse(base).partition("[")[0].split(".")[1:]
        found = pkgutil.resolve_name(".".join([path, *rest]))
        for line, name in private:
            if hasattr(found, name):
                yield line, f"{ast.unparse(base)}.{name}"
