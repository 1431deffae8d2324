"""Several evaluations in one process: checked before the first begins, and each as if alone."""

import os
import shutil
import subprocess
import sys

import pytest

import eval.knn
import eval.linear
from common.errors import UserError
from eval.__main__ import EVALUATIONS, SETTINGS, main, parse
from tests.eval.harness import assert_same_records, records, save_images, save_run
from tests.helpers import ROOT, evaluate


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", data=str(save_images(tmp_path / "source")))


def test_the_same_records_as_one_command_each(run, tmp_path):
    alone = shutil.copytree(run, tmp_path / "alone")
    knn = ("--k", "5", "--baselines", "random")
    linear = ("--protocol", "features", "--epochs", "2")
    evaluate(eval.knn, alone, *knn)
    evaluate(eval.linear, alone, *linear)
    main(parse(["knn", str(run), *knn, "--", "linear", str(run), *linear]))
    assert len(list((run / "results").iterdir())) == 3
    assert_same_records(run / "results", alone / "results")


def test_every_evaluation_has_its_settings(run):
    assert EVALUATIONS.keys() == SETTINGS.keys()
    words = " -- ".join(f"{name} {run}" for name in SETTINGS).split()
    assert [(name, type(settings)) for name, settings in parse(words)] == [*SETTINGS.items()]


@pytest.mark.parametrize(
    "last, message",
    [
        ("linear RUN --epochs -1", "linear: --epochs -1: must be a number from 0 to 1,000,000"),
        ("linear nowhere", "linear: nowhere: no such file"),
        ("transfer RUN --data nowhere", "transfer: nowhere: no such folder or file"),
        ("lineal RUN", "lineal: not one of knn, linear, finetune, transfer, neighbours, compare"),
        ("", "no command: not one of knn"),
    ],
)
def test_a_mistake_in_the_last_command_is_one_line_before_the_first(run, tmp_path, last, message):
    """And before torch is imported, here a file that ends the process."""
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    words = f"knn RUN -- {last}".replace("RUN", str(run)).split()
    done = subprocess.run(
        [sys.executable, "-m", "eval", *words],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {message}")
    assert not list((run / "results").iterdir())


def test_a_command_that_fails_is_named_and_is_the_last(run):
    commands = ["knn RUN --k 5", "finetune RUN --freeze 5", "linear RUN --protocol features"]
    words = " -- ".join(commands).replace("RUN", str(run)).split()
    with pytest.raises(UserError, match=r"^finetune: --freeze 5: the encoder has 4 stages"):
        main(parse(words))
    assert [*records(run)] == ["knn-weighted-k5-encoder"]


def test_without_arguments_it_lists_the_evaluations(capsys):
    with pytest.raises(SystemExit) as end:
        parse([])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name, kind in SETTINGS.items():
        assert f"python -m eval.{name} RUN " in shown and kind.__doc__ in shown


def test_help_teaches_it(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m eval knn RUN --baselines random pixels -- linear RUN" in shown
    with pytest.raises(SystemExit) as end:
        parse(["knn", "--help"])
    assert end.value.code == 0 and "--temperature" in capsys.readouterr().out
