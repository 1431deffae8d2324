"""Tables of what was measured, beside what was published; RESULTS.md from its records."""

import json
import sys

import pytest
from PIL import Image

import eval.compare as compare
from common import cli

AT = {"commit": "abcdef123456", "device": "CPU (2 cores)", "processes": 1}


def judged(run, protocol, subject="encoder", top1=50.0, **other):
    """Write a record as eval/results.py does, for a run made by `made`."""
    known = json.loads((run / "config.json").read_text())
    cfg = known["config"]
    row = {
        "protocol": protocol,
        "subject": subject,
        "top1": top1,
        "interval": 1.7,
        "data": cfg["data"],
        "train_images": 50_000,
        "test_images": 10_000,
        "method": known["method"],
        "recipe": known["recipe"],
        "epochs": float(cfg["epochs"]),
        **{key: cfg[key] for key in ("arch", "stem", "batch_size", "seed", "published")},
        "pretrained_at": AT["commit"],
        "seconds": 3.0,
        "judged": AT | {"command": f"python -m eval.knn {run}"},
    }
    path = run / "results" / f"{protocol}-{subject}.json"
    path.write_text(json.dumps(row | other))


def made(folder, method="simclr", recipe="demo", **config):
    """A run's folder without judgements."""
    (folder / "results").mkdir(parents=True)
    cfg = {"data": "demo", "out": str(folder), "seed": 1, "batch_size": 256, "epochs": 39}
    cfg |= {"arch": "demo", "stem": "imagenet", "published": ""} | config
    command = f"python -m {method}.pretrain {recipe} --data {cfg['data']} --out {folder}"
    record = {"method": method, "recipe": recipe, "config": cfg, "images": 5120, "steps": 780}
    record["launches"] = [AT | {"command": command}]
    (folder / "config.json").write_text(json.dumps(record))
    timing = {"step": 0, "pairs_per_second": 580.0, "data_wait": 0.1, "peak_memory_gb": 1.25}
    (folder / "timings.jsonl").write_text(json.dumps(timing) + "\n")
    return folder


@pytest.fixture
def three(tmp_path):
    """A demo run of each method, each with its own baselines."""
    runs = []
    for i, method in enumerate(("simclr", "moco", "byol")):
        run = made(tmp_path / f"{method}-demo", method)
        for j, protocol in enumerate(("knn20", "knn200", "linear-features")):
            judged(run, protocol, top1=60 + 10 * i + j)
            judged(run, protocol, "pixels", top1=20 + i)
            judged(run, protocol, "random", top1=30 + i)
        judged(run, "finetune-100", "random", top1=95 + i)
        runs.append(run)
    judged(runs[1], "knn20-output", top1=55)
    judged(runs[1], "knn200-output", top1=54)
    return runs


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
        cli.run(compare.main)
        return capsys.readouterr().out

    return call


def rows(*runs):
    return [row for run in runs for row in compare.rows_of(run)]


def cells(table):
    """{(line, column): cell} of a table."""
    head, *body = table
    return {(line[0], name): cell for line in body for name, cell in zip(head, line, strict=True)}


# ---- one table of several runs -------------------------------------------------------------------


def test_one_table_for_all_methods(three):
    table = compare.overview(compare.once(rows(*three))[0])
    assert [line[0] for line in table] == [
        "Top-1 (%)",
        "raw pixels",
        "random encoder",
        "SimCLR demo, 39 epochs",
        "MoCo demo, 39 epochs",
        "BYOL demo, 39 epochs",
        "supervised twin",
    ]
    found = cells(table)
    assert found["SimCLR demo, 39 epochs", "kNN (k 20)"] == "60.0 ± 1.7"
    assert found["BYOL demo, 39 epochs", "linear (on features)"] == "82.0 ± 1.7"
    # the first run's baselines, each once
    assert found["raw pixels", "kNN (k 200)"] == "20.0 ± 1.7"
    assert found["random encoder", "linear (on features)"] == "30.0 ± 1.7"
    assert found["supervised twin", "fine-tuned, all labels"] == "95.0 ± 1.7"


def test_the_heads_output_is_a_column_of_its_own(three):
    found = cells(compare.overview(compare.once(rows(*three))[0]))
    assert found["MoCo demo, 39 epochs", "kNN (k 20)"] == "70.0 ± 1.7"
    assert found["MoCo demo, 39 epochs", "kNN (k 20) on the head's output"] == "55.0 ± 1.7"
    assert found["SimCLR demo, 39 epochs", "kNN (k 20) on the head's output"] == ""


def test_whose_baselines_is_said_only_where_there_are_several(three):
    note = compare.once(rows(*three))[1]
    assert note.startswith("raw pixels, random encoder, supervised twin: as measured with simclr")
    assert compare.once(rows(three[0])) == (rows(three[0]), "")


def test_seeds_share_a_line(tmp_path):
    runs = [made(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]
    for run, top1 in zip(runs, (70.0, 71.0, 72.0), strict=True):
        judged(run, "knn20", top1=top1)
    table = compare.overview(rows(*runs))
    assert table[1] == ["SimCLR demo, 39 epochs", "71.0, sd 1.0 over 3 seeds (70.0, 71.0, 72.0)"]


def test_the_command_on_three_runs(three, command):
    shown = command(*three)
    assert "On demo, 10,000 test images" in shown and "as measured with simclr-demo" in shown
    assert max(map(len, shown.splitlines())) <= 110
    page = (three[0] / "compare.md").read_text()
    assert page.count("| raw pixels |") == 1 and "| MoCo demo, 39 epochs |" in page
    with Image.open(three[0] / "compare.png") as picture:
        assert picture.width > picture.height > 300


def test_no_results_yet_is_one_line(tmp_path):
    with pytest.raises(cli.UserError, match=r"first: python -m eval\.knn"):
        compare.rows_of(made(tmp_path / "run"))


def test_long_headings_and_cells_are_wrapped():
    text = compare.as_text([["", "words in a heading"], ["a", "12.5"], ["b", "said " * 20]])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 43 and text.count("said") == 20
    assert lines[0].strip() == "words in a heading" and set(lines[1]) == {"-"}
    short = compare.as_text([["", "words in a heading"], ["a", "12.5"]]).splitlines()
    assert [line.strip() for line in short[:2]] == ["words in a", "heading"]
    assert compare.as_text([["", "k"], ["", ""], ["a", "1"]]).splitlines()[-1].split() == ["a", "1"]
