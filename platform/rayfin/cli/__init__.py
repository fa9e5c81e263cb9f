"""The command line: `rayfin VERB [config.yaml] [section.key=value …]`.

Nothing heavy is imported before a verb runs, so that `rayfin --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rayfin import __version__
from rayfin.cli import (
    adapters,
    chat,
    completion,
    doctor,
    estimate,
    history,
    init,
    recommend,
    serve,
    sweep,
    train,
)
from rayfin.cli.parser import Parser, print_error
from rayfin.cli.quiet import quiet_libraries
from rayfin.cli.signals import ends_as_by_ctrl_c
from rayfin.errors import RayfinError, UsageError

INTERRUPTED = 130
"""The shell's exit code for Ctrl-C."""


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
    modules = (init, sweep, train, recommend, estimate, serve, chat, history, adapters, doctor)
    for module in (*modules, completion):
        module.register(verbs)
    return parser


def script(verb: str, defaults: str, description: str) -> int:
    """Runs a script in experiments/: `verb` on the script's own configuration, with overrides."""
    module = {"sweep": sweep, "train": train}[verb]
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.set_defaults(defaults=defaults)
    return _run(parser)


def guarded(command: Callable[[], int]) -> int:
    """Runs `command`, which parses its arguments first; rayfin's errors are one line on stderr."""
    # Before torch is loaded, here or in a Ray worker: threads that spin while they wait slow each
    # other down several times over when something else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's own threads spin whatever that says, and the advisor's matrices are small.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    quiet_libraries()
    try:
        return command()
    except UsageError as error:
        print_error(error)
        return 2
    except RayfinError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`rayfin history list | head`): not an error.
        sys.stdout = None
        return 0


def _run(parser: Parser, argv: Sequence[str] | None = None) -> int:
    def command() -> int:
        args = parser.parse_args(argv)
        code: int = args.handler(args)
        return code

    with ends_as_by_ctrl_c() as received:
        code = guarded(command)
    return 128 + received[0] if received and code == INTERRUPTED else code
