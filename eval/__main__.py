"""Several evaluations in one process, which pays the seconds of their imports once.

    python -m eval knn RUN --baselines random pixels -- linear RUN --protocol features
    python -m eval knn RUN -- finetune RUN --weights random --epochs 20 -- compare RUN
    python -m eval knn --help                          # the settings of one evaluation

`--` stands between two commands. Each is written as after `python -m eval.NAME`; without arguments
the names are listed. All are checked before the first begins; they run in order, and one that fails
is the last.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common import cli
from common.errors import UserError
from eval.settings import KNN, Compare, Export, Finetune, Import, Linear, Neighbours, Transfer

SETTINGS: dict[str, type] = {
    "knn": KNN,
    "linear": Linear,
    "finetune": Finetune,
    "transfer": Transfer,
    "neighbours": Neighbours,
    "compare": Compare,
}


def parse(words: Sequence[str]) -> list[tuple[str, Any]]:
    """The name and the settings of every command.

    Raises:
        UserError: a command is unknown, or a value in it makes no sense; the command is named.
        SystemExit: as `cli.parse_settings`; status 0 after `--help`, or without any word.
    """
    if list(words) in ([], ["--help"], ["-h"]):
        print(__doc__.strip() if words else overview())
        sys.exit(0)
    commands = []
    for name, *flags in split(words):
        if name not in SETTINGS:
            names = ", ".join(SETTINGS)
            raise UserError(f"{name or 'no command'}: not one of {names}; see --help")
        kind, program = SETTINGS[name], f"python -m eval {name}"
        try:
            settings: Any = cli.parse_settings(kind, flags, program, kind.__doc__ or "")
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        commands.append((name, settings))
    return commands


def overview() -> str:
    """What there is, each in a line."""

    def line(name: str, kind: type, target: str = "RUN") -> str:
        return f"python -m eval.{f'{name} {target}':<16}  {(kind.__doc__ or '').splitlines()[0]}"

    what = "a run's folder, an encoder.safetensors or an official checkpoint"
    head = f"Judge an encoder: RUN is {what}."
    between = "Weights in and out:"
    end = "--help after one shows its settings; several in one process: python -m eval --help"
    judged = [line(name, kind) for name, kind in SETTINGS.items()]
    moved = [line("export", Export), line("weights", Import, "FILE")]
    return "\n".join([head, "", *judged, "", between, "", *moved, "", end])


def split(words: Sequence[str]) -> Iterator[list[str]]:
    """The words of each command; `[""]` for one without any."""
    command: list[str] = []
    for word in [*words, "--"]:
        if word == "--":
            yield command or [""]
            command = []
        else:
            command.append(word)


if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(parse, sys.argv[1:])

from eval import compare, finetune, knn, linear, neighbours, transfer

EVALUATIONS: dict[str, Callable[[Any], None]] = {
    "knn": knn.main,
    "linear": linear.main,
    "finetune": finetune.main,
    "transfer": transfer.main,
    "neighbours": neighbours.main,
    "compare": compare.main,
}


def main(commands: Sequence[tuple[str, Any]]) -> None:
    """Run every command, in order."""
    for name, settings in commands:
        try:
            EVALUATIONS[name](settings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


if __name__ == "__main__":
    cli.run(main, arguments)
