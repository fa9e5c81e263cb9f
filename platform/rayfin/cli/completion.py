"""Completion in the shell: `rayfin completion bash`, and what may stand at the cursor."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Kind = Literal["experiment", "deployment", "storage", "storage and history"]
"""Which settings a verb takes."""

_SHELLS = ("bash", "zsh", "fish")
_AXIS = "sweep.parameters."
_SWEPT = ("model.", "data.", "method.", "train.")
_PATHS = (
    *("data.path", "data.eval_path", "data.chat_template"),
    *("model.name", "scaling.strategy_config"),
)
_DIRECTORIES = ("storage", "publish.storage")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `completion`, which prints what a shell evaluates to complete rayfin's words."""
    summary = "print what makes a shell complete verbs, options and settings"
    parser = subparsers.add_parser(
        "completion",
        help=summary,
        description=f"{summary.capitalize()}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Put one of these lines into the shell's start-up file:\n"
            '  bash  ~/.bashrc                   eval "$(rayfin completion bash)"\n'
            '  zsh   ~/.zshrc, after compinit    eval "$(rayfin completion zsh)"\n'
            "  fish  ~/.config/fish/config.fish  rayfin completion fish | source"
        ),
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(handler=_print)


def _print(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["rayfin"], shell=args.shell))
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process, if it is the shell that asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        # Options are suggested after a dash only: without one the settings would drown in them.
        argcomplete.autocomplete(parser, always_complete_options=False)


class SettingsCompleter:
    """Completes `section.key=value`, and the configuration file that may go first."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def names(self) -> list[str]:
        """Dotted names of all settings that the verb takes."""
        return list(_settings(self._kind))

    def __call__(self, prefix: str, **_: Any) -> dict[str, str]:
        """Completion -> what it means, for all that `prefix` may become."""
        name, equals, begun = prefix.partition("=")
        known = _settings(self._kind)
        if equals:
            field = known.get(name.removeprefix(_AXIS))
            return {f"{name}={value}": "" for value in _values(name, field, begun)}
        found = {f"{key}=": (field.description or "") for key, field in known.items()}
        if self._kind == "experiment":
            axes = [key for key in known if key.startswith(_SWEPT)]
            found |= {f"{_AXIS}{key}=": "an axis of the sweep" for key in axes}
        if not prefix.startswith(_AXIS):  # they would be most of what there is
            found = {key: text for key, text in found.items() if not key.startswith(_AXIS)}
            found |= {_AXIS: "an axis of the sweep"} if self._kind == "experiment" else {}
        found |= dict.fromkeys(_paths(prefix, (".yaml", ".yml")), "")
        return {key: text for key, text in found.items() if key.startswith(prefix)}


class DataCompleter(SettingsCompleter):
    """Completes files and directories of data, too, which may go first."""

    def __call__(self, prefix: str, **_: Any) -> dict[str, str]:
        """Completion -> what it means, for all that `prefix` may become."""
        found = super().__call__(prefix)
        return found if "=" in prefix else found | dict.fromkeys(_paths(prefix, None), "")


def _settings(kind: Kind) -> dict[str, FieldInfo]:
    """Dotted name -> field; of `method` those of all methods."""
    from rayfin.config import Config, PublishConfig, ServeConfig
    from rayfin.config.schema import train_section
    from rayfin.methods import METHODS
    from rayfin.objectives import OBJECTIVES

    if kind == "storage":
        return {"storage": Config.model_fields["storage"]}
    if kind == "storage and history":
        return {name: Config.model_fields[name] for name in ("storage", "history")}
    found: dict[str, FieldInfo] = {}
    for name, field in (Config if kind == "experiment" else ServeConfig).model_fields.items():
        sections: Iterable[type[BaseModel]]
        if name == "method":
            sections = METHODS.values()
        elif name == "train":
            sections = map(train_section, OBJECTIVES)
        elif name == "publish":
            sections = (PublishConfig,)
        elif field.description:
            found[name] = field
            continue
        else:
            sections = (type(field.default),)
        for section in sections:
            for key, inner in section.model_fields.items():
                found.setdefault(f"{name}.{key}", inner)
    found.pop(_AXIS.rstrip("."), None)
    return found


def _values(name: str, field: FieldInfo | None, begun: str) -> Iterator[str]:
    """What may follow `name=`: a choice's values, true and false, or paths."""
    if name == "method.type":
        from rayfin.methods import METHODS

        yield from METHODS
    elif name == "model.name":
        from rayfin.models.bundled import BUNDLED

        yield from BUNDLED
    elif name == "data.path":
        yield "pydocs"
    elif name == "data.chat_template":
        from rayfin.models.chat_templates import template_names

        yield from template_names()
    if name in _PATHS:
        yield from _paths(begun, None)
    elif name in _DIRECTORIES:
        yield from _paths(begun, ())
    elif field is not None and name != "method.type":
        from rayfin.section import registered_names

        yield from registered_names(field)
        yield from _choices(field.annotation)


def _choices(annotation: Any) -> Iterator[str]:
    """The values of a Literal, a bool, or of a union that has one."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from (str(value) for value in get_args(annotation))
    elif annotation is type(None):
        yield "null"
    else:
        for member in get_args(annotation):
            yield from _choices(member)


def _paths(begun: str, endings: tuple[str, ...] | None) -> Iterator[str]:
    """Paths that begin so: directories, and files with one of the endings; None takes all files."""
    parent, _, name = begun.rpartition("/")
    folder = Path(parent or ("/" if begun.startswith("/") else ".")).expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
            shown = f"{begun.removesuffix(name)}{entry.name}" if name else f"{begun}{entry.name}"
            if entry.is_dir():
                yield f"{shown}/"
            elif endings is None or entry.suffix in endings:
                yield shown
