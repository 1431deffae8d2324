"""The command line: a recipe, flags, and mistakes in one line with exit status 2."""

import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

import eval.compare
import eval.finetune
import eval.knn
import eval.linear
import eval.neighbours
import eval.transfer
from common import cli, config
from common.config import RunConfig
from common.errors import UserError
from simclr.config import RECIPES, Config
from tests.helpers import ROOT, evaluate, pretrain

parse = partial(cli.parse, "simclr", Config, RECIPES)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Calls a command and gives what it wrote to stderr; the status must be 2."""

    def call(function, *args):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            function(*args)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return call


def one_line(text):
    *before, line = text.splitlines()
    assert line.startswith("error: ") and not any("error" in said for said in before), text
    return line


def small(method, *argv):
    return partial(pretrain, method, "demo", "--batch-size", 4, "--out", "run", *argv)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Where no demo has been run, whose folder is the default of --out."""
    monkeypatch.chdir(tmp_path)


# ---- settings ------------------------------------------------------------------------------------


def test_the_recipe_is_the_first_argument_and_demo_without_one():
    demo, changed = RECIPES["demo"]
    assert parse([]) == ("demo", demo, RunConfig(out="runs/simclr-demo", **changed))
    name, cfg, run_cfg = parse(["--seed", "7"])
    assert (name, cfg, run_cfg.seed) == ("demo", demo, 7)
    name, cfg, run_cfg = parse(["cifar10", "--epochs", "2.5", "--out", "here", "--workers", "3"])
    assert name == "cifar10" and cfg == dataclasses.replace(RECIPES["cifar10"][0], epochs=2.5)
    assert run_cfg == RunConfig(out="here", workers=3)


def test_help_shows_the_recipes_values_and_sources(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["cifar10", "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "uoft-cs/cifar10" in shown and "Table 5" in shown and "imagenet-100ep" in shown


def test_former_spellings_of_flags():
    for argv in (
        ["--cache-chunk", "64", "--test-size", "40"],
        ["--cache-chunk=64", "--test-size=40"],
        ["--cache_chunk", "64", "--test_size=40"],
    ):
        cfg = parse(argv)[1]  # fmt: skip
        assert (cfg.grad_cache_chunk, cfg.eval_size) == (64, 40)
    with pytest.raises(UserError, match="--grad-cache-chunk 3: must divide"):
        parse(["--cache-chunk", "3"])


def test_settings_of_an_evaluation():
    def parsed(*argv):
        return cli.parse_settings(eval.knn.Settings, argv, "prog", "What it does.")

    assert parsed("--k", "3", "5", "--data", "demo") == eval.knn.Settings(k=(3, 5), data="demo")
    with pytest.raises(UserError, match="nowhere: no such file; a run writes it"):
        parsed("nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder or file"):
        parsed("--data", "nowhere")


def test_what_looks_like_a_data_set_on_the_hub():
    for source in ("uoft-cs/cifar10", "a/b.c-d"):
        assert cli.is_hub_id(source)
    for source in ("a", "a/b/c", "./a", "../a", "~a/b", "a/", "/a", "a b/c", "a/b\n", ""):
        assert not cli.is_hub_id(source)


# ---- mistakes that need no image -----------------------------------------------------------------


def test_an_unknown_recipe():
    with pytest.raises(UserError, match=r"no recipe 'cifar1'; did you mean 'cifar10'\?"):
        parse(["cifar1"])
    with pytest.raises(UserError, match=r"no recipe 'qqqq'; recipes: demo, .*imagenet"):
        parse(["qqqq"])


def test_an_unknown_flag_names_the_nearest(fails):
    assert "--temperature" in fails(parse, ["demo", "--temperatur", "1"])
    assert "--precision" in fails(parse, ["--precision", "fp8"])


def test_every_flag_refuses_what_is_out_of_range(fails):
    for words in ("--epochs nan", "--seed -1", "--image-size 0", "--base-lr inf", "--workers -1"):
        line = one_line(fails(pretrain, "simclr", *words.split()))
        assert words.split()[0] in line and ": must be a number from " in line
    assert "--k 0: must be" in one_line(fails(evaluate, eval.knn, "--k", 20, 0))
    for module, words in (
        (eval.linear, "--epochs -1"),
        (eval.finetune, "--label-fraction 10"),
        (eval.transfer, "--layer -2"),
    ):
        assert words in one_line(fails(evaluate, module, *words.split()))


@pytest.mark.parametrize(
    ("environment", "argv", "said"),
    [
        ({"WORLD_SIZE": "5"}, ("--batch-size", "12"), "12: not divisible by 5 processes"),
        ({}, ("--processes", "2"), "--processes 2 asked for, 1 launched; .*--multi_gpu"),
        ({"WORLD_SIZE": "2"}, ("--processes", "4"), "--processes 4 asked for, 2 launched"),
    ],
)
def test_what_the_launcher_has_started(monkeypatch, environment, argv, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        parse(argv)


@pytest.mark.parametrize("argv", [["--arch", "timm:vit"], ["--trackers", "tensorboard", "wandb"]])
def test_a_missing_package_names_its_extra(monkeypatch, argv):
    name = "timm" if "--arch" in argv else "wandb"
    parse(argv)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else there(n))
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install .*\[{name}\]"):
        parse(argv)


def test_an_out_that_holds_another_run(tmp_path):
    out = ["--out", str(tmp_path)]
    _, cfg, run_cfg = parse(out)
    record = {"method": "simclr", "config": config.flat(cfg, run_cfg)}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert parse(out) == ("demo", cfg, run_cfg)
    with pytest.raises(UserError, match=r"holds a run made with temperature 0.1 \(now 0.2\)"):
        parse([*out, "--temperature", "0.2"])
    assert parse([*out, "--log-every", "1"])[2].log_every == 1
    (tmp_path / "config.json").write_text(json.dumps(record | {"launches": 3}))
    with pytest.raises(UserError, match="not of a run; give another --out"):
        parse(out)


# ---- paths and sources ---------------------------------------------------------------------------


def test_a_home_folder_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("images", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    for argv in (["--out", "~/r", "--data", "~/images"], ["--out=~/r", "--data=~/images/"]):
        _, cfg, run_cfg = parse(argv)
        assert (run_cfg.out, cfg.data) == (f"{tmp_path}/r", f"{tmp_path}/images")
    with pytest.raises(UserError, match=r"~nobody-at-all/r: no such home folder"):
        parse(["--out", "~nobody-at-all/r"])

    def settings(kind, *argv):
        return dataclasses.asdict(cli.parse_settings(kind, argv, "prog", "What it does."))

    weights = "torchvision:resnet50=~/w.pt"
    found = settings(
        eval.finetune.Settings, "~/run", "--subset", "~/list", "--weights", weights, "--data=~/run"
    )
    assert found["run"] == found["data"] == f"{tmp_path}/run"
    assert found["subset"] == f"{tmp_path}/list"
    assert found["weights"] == f"torchvision:resnet50={tmp_path}/w.pt"
    folders = ["--out", "~/a", "--report=~/b", "--keep", "~/c", "--results", "~/d"]
    found = settings(eval.compare.Settings, "~/run", *folders)
    assert [*found["runs"], found["out"], found["report"], found["keep"], found["results"]] == [
        f"{tmp_path}/{name}" for name in ("run", "a", "b", "c", "d")
    ]


@pytest.mark.parametrize("argv", [["--out", ""], ["--out="], ["--out", " "], ["--data", ""]])
def test_an_empty_name_is_that_of_a_variable_that_is_not_set(monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{argv[0].strip('=')}: an empty name"):
        parse(argv)
    with pytest.raises(UserError, match=f"{argv[0].strip('=')}: an empty name"):
        cli.parse_settings(eval.neighbours.Settings, argv, "prog", "What it does.")
    for kind in (eval.compare.Settings, eval.knn.Settings):
        with pytest.raises(UserError, match="RUN: an empty name"):
            cli.parse_settings(kind, [""], "prog", "What it does.")
    assert not any(tmp_path.iterdir())


def test_a_source_that_exists_is_recorded_where_it_is(monkeypatch, tmp_path):
    for name in ("owner/name", "a:b", "demo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    monkeypatch.chdir(tmp_path)
    for given, recorded in (
        ("owner/name", f"{tmp_path}/owner/name"),
        ("./owner/name/", f"{tmp_path}/owner/name"),
        ("owner/name:plain", f"{tmp_path}/owner/name:plain"),
        ("a:b", f"{tmp_path}/a:b"),
        ("demo", "demo"),
        ("./demo", f"{tmp_path}/demo"),
        ("other/name", "other/name"),
        ("other/name:plain", "other/name:plain"),
    ):
        assert parse(["--data", given])[1].data == recorded
        assert cli.absolute(recorded) == recorded
        assert cli.is_hub_id(recorded) == (given == recorded != "demo")
    with pytest.raises(UserError, match="nowhere:plain: no such folder"):
        parse(["--data", "nowhere:plain"])


def test_a_configuration_is_what_stands_behind_the_last_colon_of_no_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    for source, parts in {
        "owner/name:c": ("owner/name", "c"), "x:y:z": ("x:y", "z"), "a:b": ("a:b", ""),
        "a:b:c": ("a:b", "c"), "a:b/c": ("a:b/c", ""), "a:": ("a:", ""), ":a": (":a", ""),
        "demo": ("demo", ""), "C:\\images": ("C:\\images", ""),
    }.items():  # fmt: skip
        assert cli.split_source(source) == parts


def test_which_sources_may_be_the_same_images(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    for old in ("a", "./a", f"{tmp_path}/a/", "/moved", "~/moved", "../far/away/x", "one"):
        assert cli.may_be_same(old, f"{tmp_path}/a"), old
    for old in ("demo", "owner/name", "a:plain", "owner/name:plain"):
        assert not cli.may_be_same(old, f"{tmp_path}/a"), old
    assert cli.may_be_same("demo", "demo") and cli.may_be_same("o/n:c", "o/n:c")
    assert not cli.may_be_same("o/n:c", "o/n") and not cli.may_be_same("demo", "o/n")


# ---- mistakes that the images show ---------------------------------------------------------------


def test_sources_that_will_not_do(fails, flat, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in it" in one_line(fails(small("simclr", "--data", "empty")))
    assert "Hub" in one_line(fails(small("simclr", "--data", "nobody/nothing")))
    line = one_line(fails(small("simclr", "--data", flat, "--batch-size", 7)))
    assert "--batch-size 7: more than the 6 images" in line
    line = one_line(fails(small("byol", "--data", flat, "--epochs", 0.1)))
    assert "--epochs: too few for one step on 6 images" in line


@pytest.mark.parametrize(
    "argv",
    [
        ("--arch", "nonsense"),
        ("--arch", "timm:nonsense"),
        ("--data", "nobody/nothing"),
        ("--batch-size", 6000),
        ("--data", "demo", "--split", "none"),
        ("--arch", "timm:vit_tiny_patch16_224", "--image-size", 40),
    ],
)
def test_what_fails_before_there_are_networks_leaves_no_folder(fails, tmp_path, argv):
    one_line(fails(small("simclr", *argv)))
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(fails, flat, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = one_line(fails(small("simclr", "--data", flat, "--out", tmp_path / "file" / "sub")))
    assert "cannot be written" in line


@pytest.mark.parametrize("module", [eval.knn, eval.linear])
def test_evaluations_of_what_is_no_run(fails, tmp_path, module):
    assert "say which RUN" in one_line(fails(evaluate, module))
    one_line(fails(evaluate, module, tmp_path))  # a folder, but not of a run
    (tmp_path / "encoder.safetensors").write_bytes(b"damaged")
    line = one_line(fails(evaluate, module, tmp_path / "encoder.safetensors", "--data", "demo"))
    assert "not an exported encoder" in line


def test_evaluations_without_labels_data_or_network(fails, flat, tmp_path):
    (tmp_path / "source" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "source" / "only" / "1.png")
    judge = partial(fails, evaluate, eval.knn, "--weights")
    assert "--data SOURCE" in one_line(judge("random:resnet18"))
    assert "resnet19: no such network; there are demo" in one_line(
        judge("random:resnet19", "--data", "demo")
    )
    weights = ("random:resnet18", "--data")
    assert "one class only (only)" in one_line(judge(*weights, tmp_path / "source"))
    assert "has no labels" in one_line(judge(*weights, flat))


# ---- one line ------------------------------------------------------------------------------------


def raising(error):
    def function():
        raise error

    return partial(cli.run, function)


def test_a_message_is_one_line_that_cannot_command_the_terminal(fails):
    assert fails(raising(UserError("first\n  second"))) == "error: first second\n"
    said = fails(raising(UserError("folder \x1b[2J\u202egnp: no images")))
    assert said == "error: folder \ufffd[2J\ufffdgnp: no images\n"


def test_only_rank_0_tells_a_mistake_and_any_rank_a_fault(fails, monkeypatch):
    for rank, world, said in (("1", "2", ""), ("0", "2", "error: once is enough\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert fails(raising(UserError("once is enough"))) == said
        assert fails(raising(MemoryError())).startswith("error: out of memory")


@pytest.mark.parametrize("world", [None, "1", "", "3", "many"])
def test_a_single_process_tells_it_whatever_rank_the_environment_has(fails, monkeypatch, world):
    monkeypatch.setenv("RANK", "3")
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert "no recipe" in fails(pretrain, "simclr", "none")
    if world in ("", "many"):
        assert "WORLD_SIZE" in one_line(fails(pretrain, "simclr"))


def test_an_error_of_ours_is_no_mistake_of_the_users():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())()


def test_ctrl_c_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as stopped:
        raising(KeyboardInterrupt())()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped by SIGINT\n"


@pytest.mark.parametrize(
    "imported, command",
    [
        ("tyro", "simclr.pretrain"),  # before the command line is read
        ("torch", "moco.pretrain demo"),  # after it, before the command begins
        ("tyro", "eval.knn x"),
        ("torch", "eval.knn --weights random:demo --data demo"),
        ("torch", "eval knn --data demo"),
        ("dataclasses", "byol"),
    ],
)
def test_ctrl_c_while_modules_are_imported(imported, command, tmp_path):
    """The first import of a module sends the signal, and would go on if that were ignored."""
    name = f"{imported}.py"
    (tmp_path / name).write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n1 / 0\n")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background job ignores it
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr == ("\nstopped by SIGINT\n" if done.returncode == 130 else "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_line_passes_whatever_the_console_can_show(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)

    def show():
        for stream in streams:
            print("caf\udce9 50 \xb1 2 \u2192 \u2026 \U0001f600", file=stream)

    cli.run(show)
    for stream in streams:
        stream.flush()
        said = stream.buffer.getvalue().decode(encoding)
        assert said.startswith("caf\\xe9 50 ") and said.endswith("\n")
        assert ("+/-" in said) == (encoding == "ascii") == ("..." in said)
