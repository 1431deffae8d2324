"""The scripts that measure on a GPU, as far as a CPU can say: their commands, order and records."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import byol.pretrain
import eval.finetune
import eval.knn
import eval.linear
import moco.pretrain
import simclr.pretrain
from common import cli
from eval.results.record import Result, write
from tests.benchmarks import gpu_speed, results_gpu
from tests.benchmarks.results_gpu import QUEUE, Job

PRETRAIN = {"simclr": simclr.pretrain, "moco": moco.pretrain, "byol": byol.pretrain}
JUDGES = {"eval.knn": eval.knn, "eval.linear": eval.linear, "eval.finetune": eval.finetune}


def parsed(command):
    """(method, config, the run's) of a pretraining command, as the command itself reads it."""
    name, argv = command[0].removesuffix(".pretrain"), command[1:]
    module = PRETRAIN[name]
    _, cfg, run_cfg = cli.parse(name, module.Config, module.RECIPES, argv)
    return module, cfg, run_cfg


# ---- the table -----------------------------------------------------------------------------------


def test_every_command_of_the_queue_is_one():
    assert len({job.name for job in QUEUE}) == len(QUEUE)
    for job in QUEUE:
        module, cfg, run_cfg = parsed(job.pretraining("demo", Path("RUN")))
        assert (cfg.epochs, run_cfg.seed, run_cfg.precision) == (job.epochs, job.seed, "bf16")
        assert (cfg.arch, cfg.batch_size) == (job.arch, job.batch_size)
        if module is simclr.pretrain or (job.arch == "resnet18" and module is moco.pretrain):
            recipe, _ = module.RECIPES[job.recipe]
            assert (cfg.arch, cfg.batch_size) == (recipe.arch, recipe.batch_size)
        for name, *words in job.judgements(Path("RUN")).values():
            tyro.cli(JUDGES[name].Settings, args=words)


def test_the_queue_starts_with_what_is_asked_for_first():
    first = [(job.method, job.recipe, job.epochs, job.supervised) for job in QUEUE[:5]]
    assert first == [
        ("simclr", "cifar10", 200, False),
        ("moco", "cifar10", 200, False),
        ("moco", "cifar10-symmetric", 200, False),
        ("byol", "cifar10", 200, False),
        ("simclr", "cifar10", 200, True),
    ]
    seeds = [job.seed for job in QUEUE if job.epochs == 200 and job.arch == "resnet18"]
    assert seeds == sorted(seeds) and set(seeds) == {1, 2, 3}


def result_of(job, task, protocol, layer, **changes):
    """The record of a judgement of a job."""
    fields = {"task": task, "protocol": protocol, "layer": layer, "epochs": job.epochs}
    fields |= {"subject": "random" if job.supervised else "encoder", "data": "x", "columns": {}}
    fields |= {"metric": "top1", "metrics": {"top1": 5.0}, "interval": 1.0, "deviations": ()}
    fields |= {"train_images": 9, "test_images": 9, "settings": {}, "changed": {}, "run_id": ""}
    fields |= {"method": job.method, "recipe": job.recipe, "encoder": f"{job.arch}-cifar"}
    fields |= {"seed": job.seed, "published": None, "run": {"seed": job.seed, "epochs": job.epochs}}
    return Result(**fields | {"pretrained_at": None, "judged": {}, "seconds": None} | changes)


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Call the script with commands that only note themselves and what they would measure."""
    done, failing = [], set()
    (tmp_path / "results").mkdir()

    def execute(command, log, deadline):
        done.append(command[0])
        if command[0] in failing:
            return False
        if command[0] == "eval.compare":
            for job in QUEUE:
                if Path(command[1]).name == job.run:
                    for key in job.judgements(Path(command[1])):
                        if f"eval.{key[0]}" == done[-2]:
                            path = tmp_path / "results" / f"{job.name}{key}.json"
                            write(result_of(job, *key), path)
        return True

    def call(*words):
        done.clear()
        argv = ["results_gpu.py", "--cpu", "--keep", str(tmp_path / "results"), *words]
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "runs")])
        cli.run(results_gpu.main)
        return list(done)

    monkeypatch.setattr(results_gpu, "execute", execute)
    return call, failing


def test_what_is_there_is_not_measured_again(played):
    call, _ = played
    first = call("--only", "simclr-cifar10-r18-200ep-seed1")
    assert first.count("simclr.pretrain") == 2 and first.count("eval.finetune") == 1
    assert first.index("eval.knn") < first.index("eval.linear") < first.index("eval.finetune")
    assert call("--only", "simclr-cifar10-r18-200ep-seed1") == []
    rest = call()
    assert rest[0] == "moco.pretrain"  # the oldest missing row
    assert sum(name.endswith(".pretrain") for name in rest) == len(QUEUE) - 2
    assert call() == []


def test_a_row_of_another_judgement_is_not_it():
    job, key = QUEUE[0], ("knn", "weighted", 0)
    assert results_gpu.is_there([result_of(job, *key)], job, *key)
    for change in (
        {"encoder": "resnet50"}, {"subject": "pixels"}, {"settings": {"k": 20}}, {"seed": 2},
        {"layer": -1}, {"epochs": 100},
    ):  # fmt: skip
        other = replace(result_of(job, *key), **change)
        assert not results_gpu.is_there([other], job, *key), change


def test_a_failure_does_not_stop_the_queue(played, capsys):
    call, failing = played
    failing.add("byol.pretrain")
    with pytest.raises(SystemExit) as caught:
        call("--only", "200ep-seed1")
    assert caught.value.code == 1
    assert "byol-cifar10-r18-200ep-seed1" in capsys.readouterr().out
    failing.clear()
    assert set(call("--only", "r18-200ep-seed1")) >= {"byol.pretrain", "eval.knn"}
    assert call("--only", "r18-200ep-seed1") == []


def test_a_command_is_ended_when_the_time_is_up(tmp_path):
    log, began = tmp_path / "log", time.monotonic()
    sleeping = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]
    with pytest.raises(results_gpu.OutOfTime):
        results_gpu.execute(sleeping, log, time.monotonic() + 1)
    assert time.monotonic() - began < 20 and "timeit" in log.read_text()
    assert results_gpu.execute(["timeit", "-n", "1", "-r", "1"], log, time.monotonic() + 60)
    assert not results_gpu.execute(["no_such_module"], log, time.monotonic() + 60)


@pytest.mark.parametrize(
    "words, said", [(["--only", "none"], "none of"), (["--only", "byol"], "no GPU")]
)
def test_mistakes_are_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = [] if said == "no GPU" else ["--cpu"]
    monkeypatch.setattr(sys, "argv", ["results_gpu.py", *words, *cpu])
    with pytest.raises(SystemExit) as caught:
        cli.run(results_gpu.main)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def pictures(folder):
    """Noise of three colours, in class folders of two splits."""
    draw = np.random.default_rng(0)
    for i in range(96):
        path = folder / ("train" if i < 64 else "test") / "rgb"[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 180, (20, 20, 3))
        pixels[..., i % 3] += 70
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.mark.slow
def test_the_queue_for_real_on_a_small_scale(tmp_path, monkeypatch):
    """Every kind of command, one epoch; then nothing is left to do."""
    small = ("--image-size", "32", "--hidden-dim", "32", "--dim", "16", "--workers", "0")
    job = Job("byol", "cifar10", 1, 1, "demo", 16, flags=small)
    queue = [job, replace(job, supervised=True)]
    monkeypatch.setattr(results_gpu, "QUEUE", queue)
    argv = ["--data", str(pictures(tmp_path / "images")), "--cpu", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["x", *argv, "--keep", str(tmp_path / "results")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.run(results_gpu.main)
    rows = results_gpu.kept(tmp_path / "results")
    protocols = {(row.task, row.protocol) for row in rows}
    linear = {("linear", "byol"), ("linear", "simclr")}
    assert protocols == linear | {("knn", "weighted"), ("finetune", "simclr")} and len(rows) == 4
    assert all(results_gpu.is_there(rows, j, *k) for j in queue for k in j.judgements(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    cli.run(results_gpu.main)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


# ---- speed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", gpu_speed.CASES, ids=lambda case: case.name)
def test_every_case_takes_the_steps_asked_for(case):
    settings = gpu_speed.Settings(steps=100, out="OUT")
    command = gpu_speed.command_of(case, "demo", 8192, settings)
    module, cfg, run_cfg = parsed(command)
    steps = module.total_steps(cfg, 8192)
    assert abs(steps - 100 * case.share) <= 1
    assert cfg.batch_size == case.batch_size and run_cfg.precision == "bf16"
    if case.extrapolated:  # eight of these are the paper's batch
        assert case.batch_size * gpu_speed.GPUS == module.RECIPES[case.recipe][0].batch_size


def test_generated_images_have_the_sizes_of_imagenet(tmp_path):
    sizes = [gpu_speed.draw_size(np.random.default_rng(i)) for i in range(2000)]
    assert np.allclose(np.mean(sizes, axis=0), (480, 410), atol=30)
    assert np.median(sizes, axis=0).tolist() == [500, 375]
    written = [gpu_speed.generate(i, tmp_path) for i in range(8)]
    width, height = np.array([Image.open(tmp_path / f"{i:06}.jpg").size for i in range(8)]).T
    assert 0.4 < sum(written) / (width * height).sum() < 0.8  # bytes a pixel: 110 kB at 500 x 375


@pytest.mark.slow
def test_the_recipes_of_imagenet_for_real_on_a_small_scale(tmp_path, monkeypatch):
    """Two steps of each method from JPEGs; the records have every figure."""
    small = "--arch demo --image-size 32 --batch-size 8 --precision fp32 --epochs 0.5 --workers 1"
    argv = ["--steps", "2", "--images", "32", "--only", "imagenet-", "--workers", "2"]
    argv += ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", *argv, f"--flags={small}"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.run(gpu_speed.main)
    paths = sorted((tmp_path / "results").glob("*.json"))
    assert [path.stem for path in paths] == [
        "speed-imagenet-byol", "speed-imagenet-moco", "speed-imagenet-simclr"
    ]  # fmt: skip
    for path in paths:
        record = json.loads(path.read_text())
        assert record["kind"] == "measurement" and "generated JPEGs" in record["title"]
        assert str(tmp_path) not in record["command"] and ".pretrain imagenet" in record["command"]
        figures = record["figures"]
        assert figures["batch_size"] == 8 and 0 <= figures["data_wait"] <= 1
        hours = figures["schedule_epochs"] * gpu_speed.IMAGENET / figures["pairs_per_second"] / 3600
        assert figures["schedule_hours_on_8"] == pytest.approx(hours / 8, rel=1e-3)
        assert record["device"].startswith("CPU") and record["commit"]
        assert os.path.exists(tmp_path / "out" / f"{path.stem.removeprefix('speed-')}.log")
