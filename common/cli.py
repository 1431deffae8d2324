"""The command line: a recipe, then any setting as a flag; mistakes in one line.

Nothing here imports torch, which takes seconds: `--help` and a mistake that shows in the command
line, the environment or a small file are answered at once.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from common import config
from common.config import Recipe, RunConfig
from common.errors import UserError, explain, printable

C = TypeVar("C")
T = TypeVar("T")


def parse(
    method: str, kind: type[C], recipes: Mapping[str, Recipe[C]], argv: Sequence[str]
) -> tuple[str, C, RunConfig]:
    """`[RECIPE] [--field value ...]` to the recipe's name and its settings. The default is `demo`.

    The recipe is taken off `argv` first, so that `--help` shows that recipe's values as defaults.

    Args:
        method: the package, e.g. "simclr".
        kind: its `Config`.
        recipes: for each name the config, and the run's settings that it needs changed.

    Raises:
        UserError: the recipe is unknown, a value makes no sense, or the folder holds another run.
        SystemExit: status 2 with tyro's box, which names the nearest flag, for a wrong flag.
    """
    check_eval()
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("demo", argv)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no recipe {name!r}; {hint}recipes: {', '.join(recipes)}")
    recipe, changed = recipes[name]
    run = dataclasses.replace(RunConfig(out=f"runs/{method}-{name}"), **changed)
    paper_kind, run_kind = _without_checks(kind), _without_checks(RunConfig)
    boxes = {"paper": paper_kind, "run": run_kind}  # in `--help`
    flags_alone: Any = tyro.conf.OmitArgPrefixes  # --seed, not --run.seed
    both = dataclasses.make_dataclass("Both", [(k, flags_alone[v]) for k, v in boxes.items()])
    parsed = tyro.cli(
        both,
        default=both(paper_kind(**vars(recipe)), run_kind(**vars(run))),
        args=_today(flags, kind),
        prog=f"python -m {method}.pretrain {name}",
        description=f"Recipes (first argument): {', '.join(recipes)}.",
    )
    try:
        cfg, run_cfg = kind(**vars(parsed.paper)), RunConfig(**vars(parsed.run))
        cfg.check_world_size(world_size())  # type: ignore[attr-defined]
    except ValueError as error:
        raise UserError(str(error)) from error
    check_environment(run_cfg, cfg.arch)  # type: ignore[attr-defined]
    check_source(cfg.data)  # type: ignore[attr-defined]
    if Path(run_cfg.out).is_file():
        raise UserError(f"--out {run_cfg.out}: a file; give a folder")
    config.refuse_other(
        Path(run_cfg.out), method, config.flat(cfg, run_cfg), config.old_names(kind)
    )
    return name, cfg, run_cfg


def parse_settings(kind: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """The settings of an evaluation, a dataclass whose `__post_init__` checks them.

    Raises:
        UserError: a value makes no sense, or `run`, `runs` or `data` is nothing there.
        SystemExit: as `parse`.
    """
    parsed = tyro.cli(_without_checks(kind), args=argv, prog=prog, description=description)
    try:
        settings = kind(**vars(parsed))
    except ValueError as error:
        raise UserError(str(error)) from error
    for target in (getattr(settings, "run", ""), *getattr(settings, "runs", ())):
        if target and not Path(target).exists():
            raise UserError(f"{target}: no such file; a run writes it at its first checkpoint")
    sources = getattr(settings, "data", "")
    for source in (sources,) if isinstance(sources, str) else sources:
        if source:
            check_source(source)
    return settings


def run(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, with a `UserError` or a fault of the machine as one line and status 2.

    Under a launcher every process meets the same mistake, which only rank 0 prints; but a full
    disk or a lost process may be met by any. Ctrl-C is no fault: one line, and status 130.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters there is an error in decode
    try:
        return function(*args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\nstopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print("error:", line, file=sys.stderr)
        sys.exit(2)


# ---- checks that need neither torch nor the images -----------------------------------------------


def world_size() -> int:
    """The number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_environment(run_cfg: RunConfig, arch: str) -> None:
    """Refuse what this environment lacks: processes, or the package of an extra.

    Raises:
        UserError: with what to do. `accelerate launch --cpu --num_processes 2` quietly starts one.
    """
    if run_cfg.processes and run_cfg.processes != world_size():
        raise UserError(
            f"--processes {run_cfg.processes} asked for, {world_size()} launched; try: "
            f"accelerate launch --multi_gpu --num_processes {run_cfg.processes} -m ..."
        )
    for package, wanted in (
        ("timm", arch.startswith("timm:")),
        ("wandb", "wandb" in run_cfg.trackers),
    ):
        if wanted:
            require(package)


def check_eval() -> None:
    """Refuse an `eval` of the user's own, which comes first on the path, before it is imported.

    Raises:
        UserError: with its file, and the way to pass over it.
    """
    found = importlib.util.find_spec("eval")
    file = found.origin if found else None
    if file is None or Path(file).resolve().parents[1] != Path(__file__).resolve().parents[1]:
        where = f"found {file}, which is another eval" if file else "no such package"
        way_out = "to pass over the current folder: python -P -m ..."
        raise UserError(f"eval: {where}; {way_out} (under a launcher: PYTHONSAFEPATH=1)")


def require(package: str) -> None:
    """Refuse to go on without the package of the extra of the same name.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; pip install -e '.[{package}]'")


def check_source(source: str) -> None:
    """Refuse images that are neither a path nor look like a data set on the Hub.

    Raises:
        UserError: no such folder or file.
    """
    try:
        there = source == "demo" or os.path.exists(os.path.expanduser(source))
    except ValueError as error:
        raise UserError(f"{source}: no path ({error})") from error
    if not there and not is_hub_id(source):
        raise UserError(f"{source}: no such folder or file (nor a Hub id of the form owner/name)")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name or owner/name:CONFIG."""
    name = r"[\w-]+/[\w.-]+(:.+)?"
    return bool(re.fullmatch(name, source)) and not source.startswith((".", "~"))


def same_place(one: str, other: str) -> bool:
    """Whether two sources are the same, whatever way their paths are written."""

    def place(source: str) -> tuple[str, str]:
        name, configuration = split_source(source)
        path = os.path.expanduser(name)
        return (os.path.realpath(path) if os.path.exists(path) else name), configuration

    return place(one) == place(other)


def split_source(source: str) -> tuple[str, str]:
    """(path or Hub id, configuration) of `folder:CONFIG` or `owner/name:CONFIG`; else (source, "").

    A path that exists as it stands has no configuration.
    """
    name, colon, configuration = source.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(source)):
        return source, ""
    if os.path.exists(os.path.expanduser(name)) or is_hub_id(source):
        return name, configuration
    return source, ""


# ---- tyro ----------------------------------------------------------------------------------------


def _without_checks(kind: type[C]) -> type[C]:
    """`kind` with no `__post_init__`: tyro would show its errors in a box, and not in one line."""
    same = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(kind.__name__, (kind,), same | {"__post_init__": lambda self: None})


def _today(flags: Sequence[str], kind: type) -> list[str]:
    """The flags with old spellings, which fields name in their metadata, in place of new ones."""
    new = config.old_names(kind)
    result = []
    for word in flags:
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key in new:
            word = f"--{new[key].replace('_', '-')}{equals}{value}"
        result.append(word)
    return result
