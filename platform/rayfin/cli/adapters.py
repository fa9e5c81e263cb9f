"""`rayfin adapters`: add, list, show, promote, rollback, unalias, rm and verify."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rayfin.cli import add_adapter
from rayfin.cli.parser import print_json
from rayfin.cli.storage_arguments import add_storage_arguments, storage_config

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion, Registry
    from rayfin.tables import TextTable

Handler = Callable[[argparse.Namespace], int]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `adapters` and its verbs; each sets `handler`, which returns the exit code."""
    summary = "add, list, promote, roll back, check and remove adapters"
    parser = subparsers.add_parser("adapters", help=summary, description=summary.capitalize())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    add_adapter.register(verbs)
    _verb(verbs, "list", "every adapter, its versions and aliases", _list)
    any_ref, name = "NAME[@VERSION|@ALIAS]", "NAME"
    _verb(verbs, "show", "one version and where it comes from", _show, ref=any_ref)
    promote = _verb(verbs, "promote", "point an alias at a version", _promote, ref=any_ref)
    back = "point an alias back at what it was before"
    rollback = _verb(verbs, "rollback", back, _rollback, name=name)
    unalias = _verb(verbs, "unalias", "drop an alias", _unalias, name=name)
    for one in (promote, rollback):
        one.add_argument("--alias", default="prod", help="the alias to move (default: prod)")
    unalias.add_argument("--alias", required=True, help="the alias to drop")
    _verb(verbs, "rm", "remove one version", _remove, ref="NAME@VERSION")
    _verb(verbs, "verify", "check files and checksums", _verify, optional_ref=any_ref)


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    verb: str,
    summary: str,
    handler: Handler,
    *,
    ref: str | None = None,
    name: str | None = None,
    optional_ref: str | None = None,
) -> argparse.ArgumentParser:
    """A verb with what it is about, as its help shows it, before the settings."""
    parser = verbs.add_parser(verb, help=summary, description=summary.capitalize())
    if ref is not None:
        parser.add_argument("ref", metavar=ref)
    if name is not None:
        parser.add_argument("name", metavar=name)
    if optional_ref is not None:
        every = "default: every version"
        parser.add_argument("ref", metavar=optional_ref, nargs="?", help=every)
    add_storage_arguments(parser, "storage")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(handler=handler)
    return parser


def _registry(args: argparse.Namespace) -> Registry:
    from rayfin.adapters import Registry
    from rayfin.paths import Storage

    # Not Storage.open: looking must not make directories.
    return Registry(Storage.at(storage_config(args).registry_storage).adapters)


def _list(args: argparse.Namespace) -> int:
    from rayfin.tables import output

    registry = _registry(args)
    registry.require()
    versions, problems = registry.scan()
    if args.json:
        _print_json(
            {
                "root": str(registry.root),
                "adapters": [version.as_dict() for version in versions],
                "problems": [str(problem) for problem in problems],
            }
        )
        return 0
    if versions:
        output().print(_table(versions))
    else:
        print(
            f"the registry at {registry.root} is empty; publish one with: "
            "rayfin sweep publish.name=NAME, or rayfin adapters add DIR NAME"
        )
    for problem in problems:
        print(f"unreadable: {problem}", file=sys.stderr)
    return 0


def _table(versions: Iterable[AdapterVersion]) -> TextTable:
    from rayfin.tables import TableColumn, TextTable

    columns = [
        TableColumn("adapter"),
        TableColumn("aliases", folds=True),
        TableColumn("type"),
        TableColumn("base model", folds=True),
        TableColumn("metrics"),
        TableColumn("created (UTC)", leaves=1),
    ]
    rows = [
        [
            version.ref,
            ", ".join(version.aliases),
            version.peft_type,
            version.base_model or "",
            _brief(version.metadata.get("metrics")),
            str(version.metadata.get("created_at", ""))[:16].replace("T", " "),
        ]
        for version in versions
    ]
    return TextTable(columns, rows)


def _show(args: argparse.Namespace) -> int:
    registry = _registry(args)
    version = registry.resolve(args.ref)
    versions, aliases = registry.versions(version.name), registry.aliases(version.name)
    if args.json:
        _print_json({**version.as_dict(), "versions": versions, "all_aliases": aliases})
        return 0
    from rayfin.paths import METADATA
    from rayfin.tables import TableColumn, TextTable, output

    facts = {
        "adapter": version.ref,
        "aliases": ", ".join(version.aliases),
        "type": version.peft_type,
        "base model": version.base_model or "",
        "path": str(version.path),
        "versions": ", ".join(map(str, versions)),
        "all aliases": ", ".join(f"{alias} -> {at}" for alias, at in aliases.items()),
    }
    shown = {"name", "version", "peft_type", "base_model"}
    rest = {key: value for key, value in version.metadata.items() if key not in shown}
    files = rest.pop("files")
    facts |= dict(_leaves(rest))
    facts |= {name: f"{digest['bytes']:,} bytes" for name, digest in files.items()}
    facts_table = [[key, value] for key, value in facts.items() if value]
    output().print(TextTable([TableColumn(""), TableColumn("", folds=True)], facts_table))
    print(f"everything about it: {version.path / METADATA}")
    return 0


def _promote(args: argparse.Namespace) -> int:
    from rayfin.adapters import AdapterRef

    ref = AdapterRef.parse(args.ref)
    return _work_done(args, _registry(args).promote(ref.name, ref, args.alias))


def _rollback(args: argparse.Namespace) -> int:
    return _work_done(args, _registry(args).rollback(args.name, args.alias))


def _work_done(args: argparse.Namespace, version: AdapterVersion) -> int:
    if args.json:
        _print_json({"alias": args.alias, **version.as_dict()})
    else:
        print(f"{version.name}@{args.alias} is now {version.ref}")
    return 0


def _unalias(args: argparse.Namespace) -> int:
    registry = _registry(args)
    registry.unalias(args.name, args.alias)
    if args.json:
        _print_json({"name": args.name, "aliases": registry.aliases(args.name)})
    else:
        print(f"{args.name}@{args.alias} is gone; its version stays")
    return 0


def _remove(args: argparse.Namespace) -> int:
    registry = _registry(args)
    removed = registry.remove(args.ref)
    latest = registry.aliases(removed.name).get("latest")
    if args.json:
        _print_json({"removed": str(removed), "latest": latest})
    else:
        print(f"removed {removed}; " + (f"latest is {latest}" if latest else "no version is left"))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from rayfin.adapters import AdapterRef
    from rayfin.errors import UsageError

    registry = _registry(args)
    registry.require()
    only = None if args.ref is None else AdapterRef.parse(args.ref)
    whole: list[str] = []
    problems: list[str] = []
    if only is not None and (only.version is not None or only.alias is not None):
        whole, refs = [registry.verify(only).ref], []
    elif only is not None:
        refs = [AdapterRef(only.name, version=at) for at in registry.versions(only.name)]
        if not refs:
            registry.resolve(only)  # raises what is wrong with it
        problems += [told for told in (registry.unpublished_copy(only.name),) if told is not None]
    else:
        versions, errors = registry.scan()
        refs = [AdapterRef(one.name, version=one.version) for one in versions]
        problems += map(str, errors)
    for one in refs:
        try:
            whole.append(registry.verify(one).ref)
        except UsageError as error:
            problems.append(str(error))
    if args.json:
        _print_json({"whole": whole, "problems": problems})
    else:
        for ref in whole:
            print(f"{ref}: whole")
        for problem in problems:
            print(f"corrupt: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _print_json(value: Any) -> None:
    print_json(value, indent=2)


def _brief(metrics: Any) -> str:
    """The figures people compare, of those that are there."""
    if not isinstance(metrics, dict):
        return ""

    from rayfin.history.record import finite
    from rayfin.metrics import METRICS, score_names

    figures = ((it, metrics.get(it)) for it in score_names() if METRICS[it].progress)
    return "\n".join(f"{name} {value:.4g}" for name, value in figures if finite(value) is not None)


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted name and text of every leaf."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner if isinstance(inner, str) else json.dumps(inner)
