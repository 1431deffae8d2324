"""Help and mistakes are answered before torch is loaded, and importing has no side effects."""

import json
import resource
import subprocess
import sys

import pytest

from common import config
from common.config import RunConfig
from simclr.config import RECIPES
from tests.helpers import METHODS, ROOT

# ---- real commands -------------------------------------------------------------------------------

WATCHED = """
import runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
finally:
    print("torch" in sys.modules)
"""
EVALUATIONS = [
    f"eval.{name}"
    for name in (
        "knn",
        "linear",
        "finetune",
        "transfer",
        "neighbours",
        "compare",
        "weights",
        "export",
    )
]


def answer(status, module, *argv):
    """What `python -m MODULE ARGV` prints; it must not load torch, and take 2.5 s at most."""
    code = WATCHED.replace("sys.argv[1]", f"{module!r}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == status, done.stderr
    *said, loaded = done.stdout.splitlines()
    assert loaded == "False" and "Traceback" not in done.stderr
    assert seconds < 2.5
    return "\n".join(said) + done.stderr


@pytest.mark.parametrize(
    "module", [*(f"{m}.pretrain" for m in METHODS), "eval", *EVALUATIONS, "common.look"]
)
def test_help(module):
    said = answer(0, module, "--help")
    assert f"python -m {module}" in said


MISTAKES = {
    "moco.pretrain cifar1": "no recipe 'cifar1'; did you mean 'cifar10'?",
    "simclr.pretrain --temperature 0": "--temperature 0.0: must be a number from 1e-06 upwards",
    "byol.pretrain --norm gn+ws --hidden-dim 24": "--hidden-dim 24: not divisible by 16",
    "simclr.pretrain --data nowhere": "nowhere: no such folder or file (nor a Hub id",
    "moco.pretrain --processes 2": "--processes 2 asked for, 1 launched; try: accelerate launch",
    "simclr.pretrain --out {other}": "holds a run made with temperature 0.3 (now 0.1)",
    "byol.pretrain --out {torn}": "config.json: cannot be read",
    "moco.pretrain --data {empty}": "no images in it, at any depth",
    "eval.linear --weights random:demo --data {empty}": "no images in it, at any depth",
    "eval knn {torn} -- linear nowhere": "linear: nowhere: no such file",
    "eval what": "what: not one of knn, linear",
    "eval.weights nowhere": "nowhere: no such file",
    "eval.export nowhere --to onnx": "--out: say into which folder",
    "eval.neighbours nowhere": "nowhere: no such file",
    "eval.transfer nowhere": "nowhere: no such file",
    "eval.finetune nowhere": "nowhere: no such file",
    "common.look nowhere": "nowhere: no such folder or file",
    "common.look {empty}": "no images in it, at any depth",
    "common.look {both}": "holds 1 table (e.g. a.parquet) and 1 image (e.g. in b); say which",
    "common.look {torn}/config.json": "not a folder, a .parquet or an .arrow file",
    "eval.knn nowhere": "nowhere: no such file",
    "eval.compare nowhere": "nowhere: no such file",
    "eval.linear --epochs -1": "--epochs -1: must be a number from 0 to 1,000,000",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of another config, a record torn by something, and sources that are refused."""
    names = ("other", "torn", "empty", "both")
    found = {name: tmp_path_factory.mktemp(name) for name in names}
    for file in ("empty/deep/a.txt", "both/a.parquet", "both/b/1.png"):
        root, name = file.split("/", 1)
        (found[root] / name).parent.mkdir(exist_ok=True)
        (found[root] / name).touch()
    settings = config.flat(RECIPES["demo"][0], RunConfig()) | {"temperature": 0.3}
    record = {"method": "simclr", "config": settings}
    (found["other"] / "config.json").write_text(json.dumps(record))
    (found["torn"] / "config.json").write_text('{"method": ')
    return found


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command, folders):
    said = answer(2, *command.format(**folders).split())
    assert said.startswith("error: ") and said.count("\n") == 1
    assert MISTAKES[command] in said


@pytest.mark.parametrize(
    "command, nearest",
    [
        ("simclr.pretrain --temperatur 1", "--temperature"),
        ("moco.pretrain --queue-size many", "--queue-size"),
        ("eval.finetune --label-fractoin 1", "--label-fraction"),
    ],
)
def test_a_wrong_flag_or_type_is_a_box_that_names_the_flag(command, nearest):
    said = answer(2, *command.split())
    assert nearest in said and "╭" in said


# ---- imports -------------------------------------------------------------------------------------

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("common", "eval", *METHODS)
    for path in sorted((ROOT / folder).glob("*.py"))
    if not path.stem.startswith("__")
]


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code, *MODULES], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_everything_can_be_imported_where_the_system_is_not_unix():
    python(
        "import importlib, signal, sys\n"
        "sys.modules |= {'fcntl': None, 'resource': None}\n"
        "del signal.pthread_sigmask\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )


def test_importing_changes_nothing_of_the_process():
    """Imported twice: first with the libraries, which do change things, and then alone."""
    python(
        "import importlib, signal, sys, warnings, torch\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "for name in list(sys.modules):\n"
        "    if name.split('.')[0] in ('common', 'eval', 'simclr', 'moco', 'byol'):\n"
        "        del sys.modules[name]\n"
        "warnings.resetwarnings()\n"
        "torch.set_num_threads(3)\n"
        "def state():\n"
        "    handlers = [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "    backends = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark\n"
        "    return list(warnings.filters), handlers, torch.get_num_threads(), backends, \\\n"
        "        torch.get_rng_state().tolist(), torch.get_default_dtype()\n"
        "before = state()\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "assert state() == before\n"
        "assert 'common.data' in sys.modules\n"
    )
