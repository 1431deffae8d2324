"""Mistakes in one line and exit status 2, in this process; tests/simclr/test_pretrain.py has some
more through a real command."""

import dataclasses
import sys

import pytest
from PIL import Image

import byol.config
import byol.pretrain
import eval.finetune
import eval.knn
import eval.linear
import eval.transfer
import moco.config
import simclr.config
import simclr.pretrain
from common import cli
from simclr.config import RECIPES, Config


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Calls a command with arguments and gives what it wrote to stderr; the status must be 2."""

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            cli.run(main)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return call


def one_line(text):
    assert text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1, text
    return text


def pretrain(*argv):
    small = ["--arch", "demo", "--batch-size", "4", "--epochs", "1", "--out", "run"]
    return simclr.pretrain.main, "demo", *small, *argv


def test_the_recipe_is_the_first_argument_and_demo_without_one():
    assert cli.parse(Config, RECIPES, [], "prog") == ("demo", RECIPES["demo"])
    name, cfg = cli.parse(Config, RECIPES, ["--seed", "7"], "prog")
    assert name == "demo" and cfg.seed == 7
    name, cfg = cli.parse(Config, RECIPES, ["cifar10", "--epochs", "2.5"], "prog")
    assert name == "cifar10" and cfg.epochs == 2.5
    assert cfg.temperature == RECIPES["cifar10"].temperature


def test_help_shows_the_recipes_values_and_sources(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Config, RECIPES, ["cifar10", "--help"], "prog")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "uoft-cs/cifar10" in shown and "Table 5" in shown and "imagenet-100ep" in shown


def test_unknown_recipe(fails):
    line = one_line(fails(simclr.pretrain.main, "cifar1"))
    assert "no recipe 'cifar1'" in line and "did you mean 'cifar10'?" in line
    assert "imagenet" in one_line(fails(simclr.pretrain.main, "qqqq"))


def test_unknown_flag_names_the_nearest(fails):
    assert "--temperature" in fails(simclr.pretrain.main, "demo", "--temperatur", "1")
    assert "--arch" in fails(simclr.pretrain.main, "demo", "--arch", "vgg")


def test_missing_path_and_folder_without_images(fails, tmp_path):
    missing = tmp_path / "none"
    assert f"{missing}: no such folder" in one_line(fails(*pretrain("--data", missing)))
    missing.mkdir()
    assert "no images in it" in one_line(fails(*pretrain("--data", missing)))
    assert "Hub" in one_line(fails(*pretrain("--data", "nobody/nothing")))


@pytest.mark.parametrize("size", ["7", "0", "-4"])
def test_a_batch_that_cannot_be_filled(fails, flat, size):
    line = one_line(fails(*pretrain("--data", flat, "--batch-size", size)))
    assert f"--batch-size {size}: " in line
    assert ("6 images" in line) == (size == "7")


def test_a_batch_that_cannot_be_shared():
    cli.check_batch(12, 12, 3)
    with pytest.raises(cli.UserError, match="not divisible by 5 processes"):
        cli.check_batch(12, 12, 5)


def test_more_processes_asked_for_than_launched(fails, flat):
    line = one_line(fails(*pretrain("--data", flat, "--processes", "2")))
    assert "--processes 2 asked for, 1 launched" in line and "--multi_gpu" in line


def test_an_output_that_cannot_be_written(fails, flat, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = one_line(fails(*pretrain("--data", flat, "--out", tmp_path / "file" / "sub")))
    assert "cannot be written" in line


@pytest.mark.parametrize("command", [eval.knn.main, eval.linear.main])
def test_evaluations_of_what_is_no_run(fails, tmp_path, command):
    assert "say which RUN" in one_line(fails(command))
    assert "none" in one_line(fails(command, tmp_path / "none"))
    one_line(fails(command, tmp_path))  # a folder, but not of a run
    (tmp_path / "encoder.safetensors").write_bytes(b"damaged")
    line = one_line(fails(command, tmp_path / "encoder.safetensors", "--data", "demo"))
    assert "not an exported encoder" in line


def test_evaluations_without_data_or_with_a_wrong_name(fails, tmp_path):
    assert "--data SOURCE" in one_line(fails(eval.knn.main, "--weights", "random:resnet18"))
    line = one_line(fails(eval.knn.main, "--weights", "random:resnet19", "--data", "demo"))
    assert "no such torchvision ResNet" in line


def test_one_class_and_no_labels_in_an_evaluation(fails, flat, tmp_path):
    (tmp_path / "source" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "source" / "only" / "1.png")
    weights = ("--weights", "random:resnet18", "--data")
    assert "one class only (only)" in one_line(fails(eval.knn.main, *weights, tmp_path / "source"))
    assert "has no labels" in one_line(fails(eval.knn.main, *weights, flat))


def test_a_number_beyond_floats_is_still_a_number():
    _, cfg = cli.parse(Config, RECIPES, ["--log-every", str(10**400)], "prog")
    assert cfg.log_every == 10**400


def test_a_message_of_several_lines_is_shown_as_one(fails):
    def main():
        raise cli.UserError("first\n  second")

    assert fails(main) == "error: first second\n"


def test_a_message_cannot_command_the_terminal(fails):
    def main():
        raise cli.UserError("folder \x1b[2J\u202egnp: no images")

    assert fails(main) == "error: folder \ufffd[2J\ufffdgnp: no images\n"


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--epochs", "-1", "--epochs -1.0: must be a number from 1e-06 to 1,000,000"),
        ("--epochs", "nan", "--epochs nan: must be a number"),
        ("--temperature", "0", "--temperature 0.0: must be a number from 1e-06 upwards"),
        ("--image-size", "0", "--image-size 0: must be a number from 1 to 10,000"),
        ("--seed", "-1", "--seed -1: must be a number from 0"),
        ("--log-every", "0", "--log-every 0: must be a number from 1 upwards"),
        ("--base-lr", "inf", "--base-lr inf: must be a number from 0 upwards"),
    ],
)
def test_numbers_that_make_no_sense(fails, flat, flag, value, said):
    assert said in one_line(fails(*pretrain("--data", flat, flag, value)))


def test_every_recipe_is_in_range_and_every_range_is_of_a_field():
    methods, judges = (
        (simclr.config, moco.config, byol.config),
        (eval.knn, eval.linear, eval.finetune, eval.transfer),
    )
    for recipe in (recipe for module in methods for recipe in module.RECIPES.values()):
        assert cli.check_ranges(recipe) is recipe
    kinds = [module.Config for module in methods] + [module.Settings for module in judges]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert cli.RANGES.keys() <= fields


def test_evaluations_refuse_numbers_too(fails):
    line = one_line(fails(eval.knn.main, "--k", "20", "0"))
    assert "--k 0: must be a number from 1 upwards" in line
    assert "--epochs -1" in one_line(fails(eval.linear.main, "--epochs", "-1"))
    assert "--label-fraction 10" in one_line(fails(eval.finetune.main, "--label-fraction", "10"))
    assert cli.check_ranges(eval.linear.Settings()).epochs == 0  # the default: the protocol's


def test_too_few_epochs_for_a_step_and_too_much_hue(fails, flat):
    small = ("--data", flat, "--out", "run", "--batch-size", "4")
    line = one_line(fails(byol.pretrain.main, "demo", *small, "--epochs", "0.1"))
    assert "--epochs: too few for one step on 6 images" in line
    line = one_line(fails(byol.pretrain.main, "demo", *small, "--jitter", *["0.9"] * 4))
    assert "hue turns by at most 0.5" in line


def test_batches_and_widths_that_byol_cannot_normalise(fails, flat):
    small = ("demo", "--data", flat, "--out", "run", "--batch-size", "4")
    line = one_line(fails(byol.pretrain.main, *small, "--accumulate", "4"))
    assert "--batch-size 4: BatchNorm needs two images or more in each of the 4 parts" in line
    line = one_line(fails(byol.pretrain.main, *small, "--norm", "gn+ws", "--hidden-dim", "24"))
    assert "--hidden-dim 24: not divisible by 16" in line


def test_only_rank_0_prints(fails, monkeypatch):
    def main():
        raise cli.UserError("once is enough")

    monkeypatch.setenv("RANK", "1")
    assert fails(main) == ""


def test_ctrl_c_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped by SIGINT\n"
