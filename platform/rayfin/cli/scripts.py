"""`rayfin.script`: a Python script takes the settings and options that the command line takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayfin.cli import experiment, sweep, train
from rayfin.cli.ending import errors_as_lines, exit_code
from rayfin.cli.parser import Parser
from rayfin.cli.signals import ends_as_by_ctrl_c

if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.library.results import SweepResult, TrainResult

_COMMANDS: Any = {"sweep": sweep, "train": train}


@dataclass
class Script:
    """What the command line of a script says."""

    config: Config
    """The script's configuration, with the `section.key=value` of the command line over it."""
    options: Mapping[str, Any]
    """`--resume`, `--rerun` and `--address`, as arguments of `rayfin.sweep` or `rayfin.train`."""
    json: bool
    """Whether the result is asked for as JSON."""
    exit_code: int = 0
    """What the process ends with; 0 does not end it."""

    def show(self, result: SweepResult | TrainResult) -> None:
        """Print the result as `rayfin sweep` and `rayfin train` do, and take their exit code."""
        from rayfin.library.results import SweepResult

        command = sweep if isinstance(result, SweepResult) else train
        self.exit_code = command.show(result, as_json=self.json)


@contextmanager
def script(
    command: Literal["sweep", "train"],
    config: Config | Mapping[str, Any],
    description: str | None = None,
) -> Iterator[Script]:
    """Read the script's command line, which takes what `rayfin sweep` or `rayfin train` takes.

    `config` is the script's own, over which the command line's settings win; a configuration file
    there takes its place. `description` is what --help prints first, such as `__doc__`. In the
    block rayfin's errors become one line on standard error, and SIGTERM does what Ctrl-C does; at
    its end the process ends where that, or what was shown, failed: with the command's exit code.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _COMMANDS[command].add_arguments(parser)
    parser.set_defaults(defaults=config)
    opened: Script | None = None
    with ends_as_by_ctrl_c() as received, errors_as_lines() as ending:
        args = parser.parse_args()
        resolved = experiment.configuration(args)
        options = _COMMANDS[command].options(args, resolved)
        opened = Script(resolved, options, args.json)
        yield opened
        ending.code = opened.exit_code
    code = exit_code(ending.code, received)
    if code or opened is None:
        raise SystemExit(code)
