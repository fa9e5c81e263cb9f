"""The command line: `rayfin VERB [config.yaml] [section.key=value …]`.

Nothing heavy is imported before a verb runs, so that `rayfin --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rayfin.cli import (
    adapters,
    chat,
    completion,
    data,
    doctor,
    estimate,
    history,
    init,
    recommend,
    serve,
    sweep,
    train,
)
from rayfin.cli.ending import errors_as_lines, exit_code
from rayfin.cli.parser import Parser
from rayfin.cli.signals import ends_as_by_ctrl_c
from rayfin.version import __version__

# The interpreter's last collections would walk over all objects of torch, for nothing: a second of
# processor time, and a minute on a machine that is very busy.
atexit.register(gc.freeze)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 3 trained
    but not published or shown, 130 interrupted.

    143 and 129 stand for SIGTERM and for a terminal that was closed, which end it as Ctrl-C does.
    """
    parser = build_parser()
    completion.answer(parser)
    return _run(parser, argv)


def build_parser() -> Parser:
    """The parser of all verbs; each sets `handler`."""
    parser = Parser(
        prog="rayfin",
        description="Parameter-efficient fine-tuning on Ray: sweep, train, publish, serve.",
    )
    parser.add_argument("--version", action="version", version=f"rayfin {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)
    modules = (
        init,
        sweep,
        train,
        recommend,
        data,
        estimate,
        serve,
        chat,
        history,
        adapters,
        doctor,
    )
    for module in (*modules, completion):
        module.register(verbs)
    return parser


def script(command: Literal["sweep", "train"], defaults: str, description: str) -> int:
    """Run a script of earlier versions, which has its configuration as YAML.

    New scripts use `rayfin.script` (docs/library.md). Returns 0; ends the process for other codes.
    """
    from rayfin.cli import scripts
    from rayfin.config import parse_yaml
    from rayfin.library.trials import sweep, train

    run: Any = {"sweep": sweep, "train": train}[command]
    with scripts.script(command, parse_yaml(defaults, "DEFAULTS"), description) as opened:
        opened.show(run(opened.config, **opened.options))
    return 0


def guarded(command: Callable[[], int]) -> int:
    """Run `command`, which parses its arguments first; rayfin's errors are one line on stderr."""
    with errors_as_lines() as ended:
        ended.code = command()
    return ended.code


def _run(parser: Parser, argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = parser.parse_args(argv)
        code: int = args.handler(args)
        return code

    with ends_as_by_ctrl_c() as received:
        code = guarded(command)
    return exit_code(code, received)
