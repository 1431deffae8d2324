"""The command line: a recipe, then any field of its `Config` as a flag; mistakes in one line."""

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import tyro

from common import faults

C = TypeVar("C")

TINY = 1e-6  # least value of what must be more than 0
RANGES = {  # least and most that make sense, of every field of that name
    "accumulate": (1, math.inf),
    "base_lr": (0, math.inf),
    "batch_size": (1, math.inf),
    "blur": (0, 1),
    "bn_splits": (1, math.inf),
    "cache_chunk": (0, math.inf),
    "crop_min_area": (0, 1),
    "dim": (1, 1_000_000),
    "epochs": (TINY, 1_000_000),
    "freeze": (0, 5),
    "head_dim": (1, 1_000_000),
    "head_layers": (1, 100),
    "hidden_dim": (1, 1_000_000),
    "image_size": (1, 10_000),
    "iterations": (1, math.inf),
    "jitter": (0, 2.5),  # SimCLR's s: a fifth of it is the turn of the hue, at most a half
    "k": (1, math.inf),
    "key_momentum": (0, 1),
    "knn_every": (0, math.inf),
    "label_fraction": (TINY, 1),
    "layer": (-1, math.inf),
    "log_every": (1, math.inf),
    "memory_gb": (0, math.inf),
    "momentum": (0, 1),
    "predictor_lr": (0, math.inf),
    "processes": (0, math.inf),
    "queue_size": (1, 100_000_000),
    "save_every": (0, math.inf),
    "seed": (0, 2**32 - 1),  # NumPy's bounds
    "solarize": (0, 1),
    "std": (TINY, math.inf),
    "tau_base": (0, 1),
    "temperature": (TINY, math.inf),
    "test_size": (0, 10_000),
    "warmup_epochs": (0, 1_000_000),
    "weight_decay": (0, math.inf),
    "workers": (0, 1_000),
}


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, no traceback."""


def printable(text: str) -> str:
    """Without what would break the line or command the terminal: a file's name may hold both."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def parse(config: type[C], recipes: Mapping[str, C], argv: list[str], prog: str) -> tuple[str, C]:
    """`[RECIPE] [--field value ...]` to the recipe's name and config. The default is `demo`.

    The recipe is taken off `argv` first, so that `--help` shows that recipe's values as defaults.

    Raises:
        UserError: the recipe is unknown, or a number makes no sense.
        SystemExit: status 2 with tyro's box, which names the nearest flag, for a wrong flag.
    """
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("demo", argv)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no recipe {name!r}; {hint}recipes: {', '.join(recipes)}")
    about = (config.__doc__ or "").split("\n\n")[0]
    parsed = tyro.cli(
        config,
        default=recipes[name],
        args=flags,
        prog=f"{prog} {name}",
        description=f"{about}\n\nRecipes (first argument): {', '.join(recipes)}.",
    )
    return name, check_ranges(parsed)


def check_ranges(config: C) -> C:
    """`config`, a dataclass, once its numbers are finite and in the `RANGES` of their names.

    A field's default is always good: some say 0 where the default depends on other things.

    Raises:
        UserError: a number is not.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        least, most = RANGES.get(field.name, (-math.inf, math.inf))
        for number in numbers if value != field.default else ():
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            finite = isinstance(number, int) or math.isfinite(number)  # of 10**400 it raises
            if not (finite and least <= number <= most):
                flag = f"--{field.name.replace('_', '-')} {number}"
                bound = f" from {least:,}" if least > -math.inf else ""
                bound += f" to {most:,}" if most < math.inf else " upwards" if bound else ""
                raise UserError(f"{flag}: must be a number{bound}")
    return config


def check_batch(batch_size: int, images: int, processes: int) -> None:
    """Refuse a batch that cannot be filled or shared.

    Raises:
        UserError: more than the images there are, or not the same for every process.
    """
    if batch_size > images:
        raise UserError(f"--batch-size {batch_size}: more than the {images} images there are")
    if batch_size % processes:
        raise UserError(f"--batch-size {batch_size}: not divisible by {processes} processes")


def run(main: Callable[[], None]) -> None:
    """Call `main`; turn `UserError` and the machine's faults into one line and exit status 2.

    Under a launcher every process meets the same mistake, which only rank 0 prints; but a full
    disk or a lost process may be met by any. Ctrl-C is no fault: one line, and status 130.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = faults.explained(error)
        if line is None:
            raise
        print("error:", line, file=sys.stderr)
        sys.exit(2)
