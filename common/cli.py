"""The command line: a recipe, then any setting as a flag; mistakes in one line.

Nothing here imports torch, which takes seconds: `--help` and a mistake that shows in the command
line, the environment or a small file are answered at once.
"""

import contextlib
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

import common
from common import config
from common.config import Recipe, RunConfig
from common.errors import UserError, explain, make_console_lenient, printable
from common.files import path_of

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
        cfg, run_cfg = kind(**located(parsed.paper)), RunConfig(**located(parsed.run))
        cfg.check_world_size(world_size())  # type: ignore[attr-defined]
    except ValueError as error:
        raise UserError(str(error)) from error
    check_environment(run_cfg, cfg.arch)  # type: ignore[attr-defined]
    check_cuda_graphs(cfg, run_cfg)
    try:
        check_source(cfg.data)  # type: ignore[attr-defined]
    except UserError as error:
        if config.data_of(Path(run_cfg.out)) == cfg.data:  # type: ignore[attr-defined]
            raise UserError(f"{error}; --data NEW goes on where the images are now") from error
        raise
    if Path(run_cfg.out).is_file():
        raise UserError(f"--out {run_cfg.out}: a file; give a folder")
    config.refuse_other(Path(run_cfg.out), method, cfg, run_cfg, may_be_same)
    return name, cfg, run_cfg


def parse_settings(kind: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """The settings of an evaluation, a dataclass whose `__post_init__` checks them.

    Raises:
        UserError: a value makes no sense, `run`, `runs` or `data` is nothing there, or a path is
            empty.
        SystemExit: as `parse`.
    """
    refuse_empty(kind, argv)
    parsed = tyro.cli(_without_checks(kind), args=argv, prog=prog, description=description)
    try:
        settings = kind(**located(parsed))
    except ValueError as error:
        raise UserError(str(error)) from error
    for target in (getattr(settings, "run", ""), *getattr(settings, "runs", ())):
        checkpoint = Path(f"{target}.index")  # TensorFlow's, whose files are named without endings
        if target and not Path(target).exists() and not checkpoint.exists():
            raise UserError(f"{target}: {_missing(target)}")
    sources = getattr(settings, "data", "")
    for source in (sources,) if isinstance(sources, str) else sources:
        if source:
            check_source(source)
    return settings


def _missing(target: str) -> str:
    """What to say of a run or a file that is not there."""
    kind, colon, name = target.partition(":")
    if name.startswith("//"):
        return "an address; download it first, and give the file or folder"
    if colon and kind in ("hf", "random", "timm", "torchvision"):
        return f"no file; this is for --weights {target}"
    if Path(target).suffix in ("", ".safetensors"):
        return "no such file; a run writes it at its first checkpoint"
    return "no such file"


def run(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, with a `UserError` or a fault of the machine as one line and status 2.

    Under a launcher every process meets the same mistake, which only rank 0 prints; but a full
    disk or a lost process may be met by any. Ctrl-C is no fault: one line, and status 130.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters there is an error in decode
    make_console_lenient()
    try:
        with common.interruptible():
            return function(*args)
    except UserError as error:
        if is_first():
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
        print("error:", printable(line), file=sys.stderr)
        sys.exit(2)


# ---- checks that need neither torch nor the images -----------------------------------------------


def world_size() -> int:
    """The number of processes that a launcher has started.

    Raises:
        UserError: the environment has no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(
            f"WORLD_SIZE={text} in the environment: not a number of processes; unset it"
        )
    return int(text)


def is_first() -> bool:
    """Whether this process tells what all meet: of several the first, and a single one always."""
    world, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return not (world.isdigit() and rank.isdigit() and 0 < int(rank) < int(world))


def check_cuda_graphs(cfg: Any, run_cfg: RunConfig) -> None:
    """Refuse to record a network that runs in another way than once in each step, by itself.

    Raises:
        UserError: with the flag that does not go with it.
    """
    others = {
        "--compile": run_cfg.compile,
        "--online-linear": run_cfg.online_linear,
        "--grad-cache-chunk": getattr(cfg, "grad_cache_chunk", 0),
        "--accumulate": getattr(cfg, "accumulate", 1) > 1,
        "several processes": world_size() > 1,
    }
    given = [name for name, is_given in others.items() if is_given]
    if run_cfg.cuda_graphs and given:
        raise UserError(f"--cuda-graphs: not with {given[0]}; choose one")


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


EXPORT = ("huggingface_hub", "onnx", "onnxruntime", "onnxscript", "transformers")


def require(package: str) -> None:
    """Refuse to go on without a package of an extra, which has its name but for those of EXPORT.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        extra = "export" if package in EXPORT else package
        raise UserError(f"{package} is not installed; pip install -e '.[{extra}]'")


def check_source(source: str) -> None:
    """Refuse images that are neither a path nor look like a data set on the Hub.

    Raises:
        UserError: no such folder or file, or no image in it.
    """
    if not source.strip():
        raise UserError("--data: an empty name, perhaps of a variable that is not set")
    path, _ = split_source(source)
    try:
        there = path == "demo" or os.path.exists(path_of(os.path.expanduser(path)))
    except ValueError as error:
        raise UserError(f"{source}: no path ({error})") from error
    if not there and not is_hub_id(source):
        raise UserError(f"{source}: no such folder or file (nor a Hub id of the form owner/name)")
    folder = path_of(os.path.expanduser(path))
    if os.path.isdir(folder):
        from common import layout, plan  # which import this module

        with contextlib.suppress(OSError, RecursionError):
            if not layout.may_hold_images(folder):
                plan.plan_of(source)  # says what is there instead


def split_source(source: str) -> tuple[str, str]:
    """A SOURCE as a path or Hub id, and the configuration behind its last colon, or "".

    What exists under the whole of the name is a path with a colon in it.
    """
    path, colon, configuration = source.rpartition(":")
    if not (colon and path and configuration) or is_there(source):
        return source, ""
    if re.search(r"[/\\]", configuration) and not is_there(path):
        return source, ""
    return path, configuration


def is_there(path: str) -> bool:
    return os.path.lexists(path_of(os.path.expanduser(path)))


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name or owner/name:CONFIG."""
    name, _ = split_source(source)
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", name)) and not name.startswith((".", "~"))


def absolute(source: str) -> str:
    """A SOURCE of the command line or of a record that any later command finds.

    A path that exists is made absolute, and so is never asked of the Hub; `~` is the home folder.
    """
    path, configuration = split_source(source)
    here = path_of(os.path.expanduser(path))
    if path == "demo" or not os.path.lexists(here):
        return source
    here = str(Path(here).absolute())
    return f"{here}:{configuration}" if configuration else here


def may_be_same(old: str, new: str) -> bool:
    """Whether two SOURCEs may be the same images: both are local, or they are written alike.

    A folder may have been moved: only its files can tell.
    """
    old, new = absolute(old), absolute(new)
    same_configuration = split_source(old)[1] == split_source(new)[1]
    return old == new or (same_configuration and is_local(old) and is_local(new))


def is_local(source: str) -> bool:
    """Whether a SOURCE is a path: it is there, or has another form than a data set on the Hub."""
    return split_source(source)[0] != "demo" and (os.path.isabs(source) or not is_hub_id(source))


# ---- paths ---------------------------------------------------------------------------------------

PATHS = ("run", "runs", "out", "report", "keep", "results", "subset")
WEIGHTS = ("weights", "baselines")  # with a file behind "="


def located(parsed: Any) -> dict[str, Any]:
    """The settings by name, `~` in every path replaced, and sources made `absolute`."""

    def each(change: Callable[[str], str], value: Any) -> Any:
        return change(value) if isinstance(value, str) else tuple(map(change, value))

    known: dict[str, Callable[[str], str]] = {"data": absolute}
    known |= {name: expanded for name in PATHS} | {name: file_expanded for name in WEIGHTS}
    return {
        name: each(known[name], value) if name in known else value
        for name, value in vars(parsed).items()
    }


def expanded(path: str) -> str:
    """A path of the command line as it is on the disk.

    Raises:
        ValueError: its `~` names no user.
    """
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"{path}: no such home folder; a file of that name is ./{path}")
    return path_of(path)


def file_expanded(weights: str) -> str:
    """The value of `--weights`, in which `torchvision:NAME=FILE`, `hf:DIR` and FILE have a path."""
    before, file = re.fullmatch(r"(hf:|[\w.]+:[\w.]+=|)(.*)", weights, re.DOTALL).groups()  # type: ignore[union-attr]
    return before + expanded(file)


def refuse_empty(kind: type, argv: Sequence[str]) -> None:
    """Refuse an empty path that was given, which would be taken for one that was not.

    Raises:
        UserError: with its flag.
    """
    names = {f.name for f in dataclasses.fields(kind)} & {*PATHS, *WEIGHTS, "data"}
    flag = ""
    for word in argv:
        given, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = given
        if not (value if equals and word.startswith("--") else word).strip():
            where = flag.removeprefix("--").replace("-", "_")
            if not flag or where in names:
                told = flag or "RUN"
                raise UserError(f"{told}: an empty name, perhaps of a variable that is not set")


# ---- tyro ----------------------------------------------------------------------------------------


def _without_checks(kind: type[C]) -> type[C]:
    """`kind` with no `__post_init__`: tyro would show its errors in a box, and not in one line."""
    same = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(kind.__name__, (kind,), same | {"__post_init__": lambda self: None})


def _today(flags: Sequence[str], kind: type) -> list[str]:
    """The flags with old spellings, which fields name in their metadata, in place of new ones."""
    new = config.old_names(kind) | config.old_names(RunConfig)
    result = []
    for word in flags:
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key in new:
            word = f"--{new[key].replace('_', '-')}{equals}{value}"
        result.append(word)
    return result
