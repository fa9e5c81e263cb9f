"""What must stay true of the whole tree, read from the files themselves."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "platform"
MODULES = sorted((SOURCE / "rayfin").rglob("*.py"))

# The parts of rayfin, left to right: a part imports from its own group and from those before it.
ORDER = (
    {"redaction", "version"},
    {"errors", "section", "sizes", "metrics", "samples", "statuses"},
    {"language"},
    {"compat"},
    {"methods"},
    {"objectives"},
    {
        "config",
        "objects",
        "paths",
        "hardware",
        "hub",
        "tables",
        "collector",
        "heartbeat",
        "watchdog",
        "trackers",
    },
    {"data", "models"},
    {"adapters"},
    {"training"},
    {"history"},
    {"tuning"},
    {"advisor"},
    {"evaluation", "export"},
    {"serving"},
    {"data_tools"},
    {"library"},
    {"cli", "__main__"},
)
RANK = {part: rank for rank, group in enumerate(ORDER) for part in group}

# These also run where only torch, transformers and peft are installed.
RAY_FREE = ("rayfin.training", "rayfin.serving.engine")
RAY_USERS = ("rayfin.training.workers", "rayfin.training.member", "rayfin.training.streams")

# `/home/ray` is the home directory inside Ray's own container images.
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:home/(?!ray\b)|root/|work/|Users/)\w")
MAX_LINES = 350


def tracked_files(*patterns: str) -> list[Path]:
    """Files that git tracks or would add, in the tree at this moment."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listing = subprocess.run([*command, *patterns], cwd=ROOT, capture_output=True, check=True)
    paths = {ROOT / name for name in listing.stdout.decode().split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """`rayfin.data.rows` -> `data`; None for `rayfin` itself and for anything else."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or None if top == "rayfin" else None


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, inside functions and `if`s too."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def rayfin_imports(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        part = part_of(name)
        if part:
            yield line, part


def runs_without_ray(path: Path) -> bool:
    name = module_name(path)
    within = tuple(f"{one}." for one in RAY_FREE)
    return f"{name}.".startswith(within) and not name.startswith(RAY_USERS)


def test_platform_does_not_shadow_the_standard_library() -> None:
    assert not (SOURCE / "__init__.py").exists()
    output = run_python("import platform; platform.system(); print(platform.__file__)")
    assert SOURCE not in Path(output.strip()).parents


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    if part is None:  # `rayfin` itself stands below everything; `import rayfin` loads no part
        return
    assert part in RANK, f"rayfin.{part} is new: give it its place in ORDER"
    back = [
        f"{path.relative_to(ROOT)}:{line}: {part} imports {other}"
        for line, other in rayfin_imports(path)
        if RANK.get(other, len(ORDER)) > RANK[part]
    ]
    assert back == []


def test_parts_of_one_group_have_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        if part := part_of(module_name(path)):
            graph.setdefault(part, set()).update(o for _, o in rayfin_imports(path) if o != part)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_modules_have_no_import_cycle() -> None:
    """An import inside a function or for types alone counts, too: it hides a cycle, no more."""
    files = {module_name(path): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = graph.setdefault(name, set())
        for _, imported in imports(path):
            module = imported if imported in files else imported.rpartition(".")[0]
            if module in files and module != name:
                found.add(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", [*filter(runs_without_ray, MODULES)], ids=module_name)
def test_trials_and_engines_import_no_ray(path: Path) -> None:
    of_ray = re.compile(r"(rayfin\.compat\.)?ray(_\w+)?(\.|$)")
    ray = [line for line, name in imports(path) if of_ray.match(name)]
    assert ray == [], f"{path.relative_to(ROOT)} imports ray on lines {ray}"


@pytest.mark.parametrize(
    "path", tracked_files("*.yaml", "*.yml"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_yaml_parses(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert any(documents), "empty"


HEAVY = "print(json.dumps(sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules))))"


def test_import_rayfin_is_light() -> None:
    parts = "[name for name in sys.modules if name.startswith('rayfin.')]"
    output = run_python(f"import json, sys, rayfin; print({parts}); {HEAVY}")
    assert output.splitlines() == ["['rayfin.version']", "[]"]


def test_help_is_light() -> None:
    code = f"""
import json, sys
sys.argv = ["rayfin", "--help"]
from rayfin.cli import main
try:
    status = main()
except SystemExit as stop:
    status = stop.code
assert not status, status
{HEAVY}
"""
    output = run_python(code)
    assert "usage" in output.lower()
    assert json.loads(output.splitlines()[-1]) == []


def test_no_machine_paths() -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # an image, a database
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line)
        ]
    assert found == []


def test_files_stay_small() -> None:
    sizes = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {str(path): size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_tolerances_of_training_and_serving_are_computed() -> None:
    """By tests/rounding.py, from the operands: a constant is what one processor gave."""
    constant = re.compile(r"\b(?:abs|atol|rtol)=\d|\ballclose\(|\bassert_close\(")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("serving", "training")
        for path in sorted((ROOT / "tests" / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if constant.search(line)
    ]
    assert found == []
