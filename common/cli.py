"""The command line: a recipe, then any field of its `Config` as a flag; mistakes in one line."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import tyro

from common import faults

C = TypeVar("C")


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, no traceback."""


def parse(config: type[C], recipes: Mapping[str, C], argv: list[str], prog: str) -> tuple[str, C]:
    """`[RECIPE] [--field value ...]` to the recipe's name and config. The default is `demo`.

    The recipe is taken off `argv` first, so that `--help` shows that recipe's values as defaults.

    Raises:
        UserError: the recipe is unknown.
        SystemExit: status 2 with tyro's box, which names the nearest flag, for a wrong flag.
    """
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("demo", argv)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no recipe {name!r}; {hint}recipes: {', '.join(recipes)}")
    about = (config.__doc__ or "").split("\n\n")[0]
    return name, tyro.cli(
        config,
        default=recipes[name],
        args=flags,
        prog=f"{prog} {name}",
        description=f"{about}\n\nRecipes (first argument): {', '.join(recipes)}.",
    )


def check_batch(batch_size: int, images: int, processes: int) -> None:
    """Refuse a batch that cannot be filled or shared.

    Raises:
        UserError: none, more than the images there are, or not the same for every process.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    if batch_size > images:
        raise UserError(f"--batch-size {batch_size}: more than the {images} images there are")
    if batch_size % processes:
        raise UserError(f"--batch-size {batch_size}: not divisible by {processes} processes")


def run(main: Callable[[], None]) -> None:
    """Call `main`; turn `UserError` and the machine's faults into one line and exit status 2.

    Under a launcher every process meets the same mistake, which only rank 0 prints; but a full
    disk or a lost process may be met by any.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        line = faults.explained(error)
        if line is None:
            raise
        print("error:", line, file=sys.stderr)
        sys.exit(2)
