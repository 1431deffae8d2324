"""The settings of a run: their ranges, their record, and what may change when the run goes on."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field, replace

import pytest

from common import cli, config
from common.config import RunConfig, check_ranges, flat, overridden, refuse_other
from common.errors import UserError
from tests.helpers import pretrain


@dataclass(frozen=True)
class Config:
    data: str = "demo"
    temperature: float = 0.5
    mean: tuple[float, ...] = (0.5, 0.4, 0.3)
    grad_cache_chunk: int = field(default=0, metadata={"was": "cache_chunk"})


RUN = RunConfig(out="run")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "--base-lr -1: must be a number from 0 to 1,000"),
        (math.nan, "--base-lr nan: must be a number"),
        ((0.5, 2000.0), "--base-lr 2000.0: must be a number"),
    ],
)
def test_ranges(value, said):
    @dataclass
    class One:
        base_lr: float | tuple[float, ...]

    for inside in (0, 1000, (0.0, 1000.0), ()):
        check_ranges(One(inside), base_lr=(0, 1000))
    with pytest.raises(ValueError, match=f"^{said}"):
        check_ranges(One(value), base_lr=(0, 1000))
    with pytest.raises(ValueError, match="--base-lr inf: must be a number from 0 upwards"):
        check_ranges(One(math.inf), base_lr=(0, math.inf))


def test_the_run_settings_have_ranges_and_large_whole_numbers_are_numbers():
    assert RunConfig(log_every=10**400).log_every == 10**400
    for wrong in ({"seed": -1}, {"seed": 2**32}, {"log_every": 0}, {"workers": -1},
                  {"memory_gb": math.nan}, {"save_every": math.inf}, {"knn_every": -1.0},
                  {"processes": -2}):  # fmt: skip
        [name] = wrong
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .*: must be a number"):
            RunConfig(**wrong)


# ---- config.json ---------------------------------------------------------------------------------


def test_a_record_is_flat_and_as_json_has_it():
    record = flat(Config(), RUN)
    assert record == json.loads(json.dumps(record)) and record["mean"] == [0.5, 0.4, 0.3]
    assert record.keys() == {
        f.name for kind in (Config, RunConfig) for f in dataclasses.fields(kind)
    }
    assert record["trackers"] == ["tensorboard"] and record["temperature"] == 0.5


def test_what_was_overridden():
    recipe = (Config(temperature=0.1), {"save_every": 5})
    assert overridden(recipe[0], RunConfig(out="anywhere", save_every=5), recipe) == []
    cfg = Config(temperature=0.1, mean=(0.0,) * 3)
    assert overridden(cfg, RUN, recipe) == ["mean", "save_every"]
    assert overridden(Config(), RunConfig(save_every=5, seed=2), recipe) == ["temperature", "seed"]


# ---- going on ------------------------------------------------------------------------------------


@pytest.fixture
def refuse(tmp_path):
    """`refuse_other` on a folder that holds a run of `Config` and `RUN`, changed by `old`."""

    def call(cfg=None, run_cfg=RUN, method="simclr", old=None, without=(), **more):
        settings = flat(Config(), RUN) | (old or {})
        settings = {key: value for key, value in settings.items() if key not in without}
        record = {"method": "simclr", "config": settings}
        (tmp_path / "config.json").write_text(json.dumps(record))
        refuse_other(tmp_path, method, cfg or Config(), run_cfg, **more)

    return call


FREE = {
    "out": "elsewhere", "compile": True, "cuda_graphs": True, "processes": 3, "workers": 0,
    "memory_gb": 9.0, "log_every": 1, "save_every": 0.5, "knn_every": 0.0, "trackers": ("wandb",),
}  # fmt: skip
FIXED = {
    "seed": 2, "split": "test", "image_column": "a", "label_column": "b", "precision": "bf16",
    "online_linear": True, "label_depth": 2, "alpha": "drop", "value_range": (0.0, 1.0),
}  # fmt: skip


def test_a_free_setting_may_change_and_a_fixed_one_may_not(refuse):
    refuse()
    refuse(run_cfg=replace(RUN, **FREE))
    assert FREE.keys() | FIXED.keys() == {f.name for f in dataclasses.fields(RunConfig)}
    for name, value in FIXED.items():
        now = list(value) if isinstance(value, tuple) else value
        said = re.escape(f"{name} {getattr(RUN, name)!r} (now {now!r})")
        with pytest.raises(UserError, match=said):
            refuse(run_cfg=replace(RUN, **{name: value}))
    with pytest.raises(UserError) as caught:
        refuse(Config(temperature=0.1, mean=(0.0,) * 3), replace(RUN, workers=9))
    line = str(caught.value)
    assert "temperature 0.5 (now 0.1)" in line and "mean [0.5, 0.4, 0.3] (now" in line
    assert "workers" not in line and "data" not in line and "\n" not in line
    with pytest.raises(UserError, match=r"method 'simclr' \(now 'byol'\)"):
        refuse(method="byol")


def test_a_run_of_before_a_setting_was_there_or_renamed(refuse):
    refuse(without=("mean", "trackers", "split"))
    refuse(Config(grad_cache_chunk=4), old={"cache_chunk": 4}, without=("grad_cache_chunk",))
    with pytest.raises(UserError, match=r"grad_cache_chunk 4 \(now 0\)"):
        refuse(old={"cache_chunk": 4}, without=("grad_cache_chunk",))


def test_a_setting_that_was_not_there_had_its_fields_default(refuse):
    """Whatever the recipe or the command says today."""
    for without in ("temperature", "grad_cache_chunk"):
        refuse(without=(without,))
    with pytest.raises(UserError, match=r"holds a run made with temperature 0.5 \(now 0.1\);"):
        refuse(Config(temperature=0.1), without=("temperature",))
    with pytest.raises(UserError, match=r"mean \[0.5, 0.4, 0.3\] \(now \[0.0, 0.0, 0.0\]\)"):
        refuse(Config(mean=(0.0,) * 3), without=("mean",))
    with pytest.raises(UserError, match=r"precision 'fp32' \(now 'bf16'\)"):
        refuse(run_cfg=replace(RUN, precision="bf16"), without=("precision",))
    with pytest.raises(UserError, match=r"grad_cache_chunk 0 \(now 4\)"):
        refuse(Config(grad_cache_chunk=4), without=("grad_cache_chunk",))


def test_a_setting_that_is_not_known_is_refused_by_name(refuse, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: has colour, shape, which"):
        refuse(old={"colour": "blue", "shape": None})
    with pytest.raises(UserError, match=r"method 'simclr' \(now 'moco'\);"):
        refuse(method="moco", old={"queue_size": 4})  # what matters is said


def test_a_value_that_stands_for_another(refuse):
    for split in ("", "train"):
        refuse(run_cfg=RunConfig(split=split), old={"split": "train"})
        refuse(run_cfg=RunConfig(split=split), old={"split": ""})
        refuse(run_cfg=RunConfig(split=split), without=("split",))
        with pytest.raises(UserError, match=rf"split 'test' \(now '{split}'\)"):
            refuse(run_cfg=RunConfig(split=split), old={"split": "test"})


def test_images_that_were_moved_are_not_refused_here(refuse):
    where = {"same_data": cli.may_be_same, "old": {"data": "/old/images"}}
    refuse(Config(data="/new/images"), **where)
    for data in ("demo", "owner/name"):
        with pytest.raises(UserError, match=rf"data '/old/images' \(now '{data}'\)"):
            refuse(Config(data=data), **where)
    with pytest.raises(UserError, match="not of a run"):
        refuse(Config(data="/new/images"), old={"data": 3})


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"method": ', "cannot be read"), ("[]", "not of a run"), ('{"method": 1}', "not of a run")],
)
def test_a_record_that_is_none(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json: {said}"):
        refuse_other(tmp_path, "simclr", Config(), RUN)


# ---- a setting for every run is one field --------------------------------------------------------


@dataclass(frozen=True)
class More(RunConfig):
    """How to run it, and in which colour."""

    colour: str = "blue"  # of nothing at all


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_one_more_field_is_a_flag_of_every_method_and_in_its_record(
    method, tmp_path, monkeypatch, capsys
):
    for module in (cli, config):
        monkeypatch.setattr(module, "RunConfig", More)
    with pytest.raises(SystemExit):
        pretrain(method, "--help")
    said = capsys.readouterr().out
    assert "--colour" in said and "of nothing at all" in said
    out = tmp_path / "run"
    step = 1 / (5120 // 64)
    tiny = ("--out", out, "--batch-size", 64, "--image-size", 8, "--epochs", step, "--knn-every", 0)
    pretrain(method, "demo", *tiny, "--colour", "red")
    record = json.loads((out / "config.json").read_text())
    assert record["config"]["colour"] == "red" and "colour" in record["overridden"]
    assert {"image_size", "epochs", "knn_every"} <= set(record["overridden"])
    assert "temperature" not in record["overridden"]
    pretrain(method, "demo", *tiny, "--colour", "green")  # free: the run goes on
