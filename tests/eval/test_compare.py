"""Tables of what was measured, beside what was published; RESULTS.md from its records."""

import importlib
import json
import shutil

import pytest
from PIL import Image

import eval.compare as compare
from common.config import old_names
from common.encoders import full_name
from common.errors import UserError
from eval.published import data_set
from tests.helpers import METHODS, ROOT, evaluate

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
        "encoder": full_name(cfg["arch"], cfg["stem"]),
        **{key: cfg[key] for key in ("batch_size", "seed", "published")},
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
        judged(run, "finetune-100-simclr", "random", top1=95 + i)
        runs.append(run)
    judged(runs[1], "knn20-output", top1=55)
    judged(runs[1], "knn200-output", top1=54)
    return runs


@pytest.fixture
def command(capsys):
    def call(*argv):
        evaluate(compare, *argv)
        return capsys.readouterr().out

    return call


def rows(*runs):
    return compare.named([row for run in runs for row in compare.rows_of(run)])


def cells(table):
    """{(line, column): cell} of a table."""
    head, *body = table
    return {(line[0], name): cell for line in body for name, cell in zip(head, line, strict=True)}


# ---- one table of several runs -------------------------------------------------------------------


def test_one_table_for_all_methods(three):
    table = compare.overview(compare.without_repeats(rows(*three))[0])
    assert [line[0] for line in table] == [
        "Top-1 (%)",
        "raw pixels",
        "random encoder",
        "SimCLR demo, 39 epochs",
        "MoCo demo, 39 epochs",
        "BYOL demo, 39 epochs",
        "supervised baseline",
    ]
    found = cells(table)
    assert found["SimCLR demo, 39 epochs", "kNN (k 20)"] == "60.0 ± 1.7"
    assert found["BYOL demo, 39 epochs", "linear (on features)"] == "82.0 ± 1.7"
    # the first run's baselines, each once
    assert found["raw pixels", "kNN (k 200)"] == "20.0 ± 1.7"
    assert found["random encoder", "linear (on features)"] == "30.0 ± 1.7"
    assert (
        found["supervised baseline", "fine-tuned, all labels (SimCLR's protocol)"] == "95.0 ± 1.7"
    )


def test_the_heads_output_is_a_column_of_its_own(three):
    found = cells(compare.overview(compare.without_repeats(rows(*three))[0]))
    assert found["MoCo demo, 39 epochs", "kNN (k 20)"] == "70.0 ± 1.7"
    assert found["MoCo demo, 39 epochs", "kNN (k 20) on the head's output"] == "55.0 ± 1.7"
    assert found["SimCLR demo, 39 epochs", "kNN (k 20) on the head's output"] == ""


def test_whose_baselines_is_said_only_where_there_are_several(three):
    note = compare.without_repeats(rows(*three))[1]
    assert note.startswith(
        "raw pixels, random encoder, supervised baseline: as measured with simclr"
    )
    assert compare.without_repeats(rows(three[0])) == (rows(three[0]), "")


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
    with pytest.raises(UserError, match=r"first: python -m eval\.knn"):
        compare.rows_of(made(tmp_path / "run"))


def test_long_headings_and_cells_are_wrapped():
    text = compare.as_text([["", "words in a heading"], ["a", "12.5"], ["b", "said " * 20]])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 43 and text.count("said") == 20
    assert lines[0].strip() == "words in a heading" and set(lines[1]) == {"-"}
    short = compare.as_text([["", "words in a heading"], ["a", "12.5"]]).splitlines()
    assert [line.strip() for line in short[:2]] == ["words in a", "heading"]
    assert compare.as_text([["", "k"], ["", ""], ["a", "1"]]).splitlines()[-1].split() == ["a", "1"]


# ---- beside what was published -------------------------------------------------------------------

CIFAR = {"data": "uoft-cs/cifar10", "arch": "resnet18", "stem": "cifar", "batch_size": 512}
NOTEBOOK = CIFAR | {"head": "linear", "views": "notebook", "symmetric": False}


def compared_with(folder, protocol, method, changed=(), **config):
    """(figures that a measurement is compared with, what it differs in)."""
    run = made(folder, method, "cifar10", **config)
    judged(run, protocol, **dict(changed))
    (row,) = compare.rows_of(run)
    found = compare.published_for(row)
    return [known.top1 for known in found], [compare.deviations(row, known) for known in found]


@pytest.mark.parametrize(
    "epochs, published, differs",
    [
        (200, 82.6, "nothing known"),
        (400, 86.3, "nothing known"),
        (800, 88.7, "nothing known"),
        (10, 82.6, "10 epochs, not 200"),
    ],
)
def test_the_row_of_the_same_epochs(tmp_path, epochs, published, differs):
    config = NOTEBOOK | {"epochs": epochs, "published": "moco-cifar10-asym-200"}
    found = compared_with(tmp_path / "run", "knn200-output", "moco", **config)
    assert found == ([published], [differs])


def test_the_variant_is_the_runs_and_not_the_recipes(tmp_path):
    config = NOTEBOOK | {"epochs": 400, "symmetric": True, "published": "moco-cifar10-asym-200"}
    assert compared_with(tmp_path / "run", "knn200-output", "moco", **config)[0] == [88.5]
    config |= {"epochs": 10, "views": "v2"}
    found = compared_with(tmp_path / "other", "knn200-output", "moco", **config)
    said = "10 epochs, not 200; symmetric True, not False; views v2, not notebook"
    assert found == ([82.6], [said])


def test_batch_network_stem_and_copies_are_said(tmp_path):
    config = CIFAR | {"epochs": 1000, "published": "simclr-cifar10-r18-1000"}
    config |= {"data": "../shared/cifar10-jpeg", "batch_size": 256, "stem": "imagenet"}
    found = compared_with(tmp_path / "run", "linear-simclr", "simclr", **config)
    said = "batch 256, not 512; ImageNet stem; JPEG copy of the data"
    assert found == ([91.0], [f"{said}; no projection in the first shortcut"])
    config["arch"] = "resnet50"
    assert "ResNet-50, not ResNet-18" in str(
        compared_with(tmp_path / "r50", "linear-simclr", "simclr", **config)
    )


@pytest.mark.parametrize(
    "protocol, method, key",
    [
        ("linear-features", "simclr", "simclr-cifar10-r18-1000"),
        ("linear-moco", "simclr", "simclr-cifar10-r18-1000"),
        ("knn200", "moco", "moco-cifar10-asym-200"),
        ("knn20-output", "moco", "moco-cifar10-asym-200"),
        ("linear-moco", "moco", "moco-cifar10-sym-800-linear"),
        ("knn200-output", "simclr", "moco-cifar10-asym-200"),
        ("finetune-100-simclr", "byol", "byol-r50-finetune-100"),
    ],
)
def test_never_across_protocols_or_methods(tmp_path, protocol, method, key):
    config = NOTEBOOK | {"epochs": 1000, "published": key}
    assert compared_with(tmp_path / "run", protocol, method, **config) == ([], [])


@pytest.mark.parametrize(
    "data, images, known",
    [
        ("ILSVRC/imagenet-1k", 50_000, True),
        ("/data/ImageNet", 50_000, True),
        ("/data/imagenet", 100_000, False),  # a fifth of train, held out
        ("imagenette2-160", 3_925, False),
        ("/data/imagenet/imagenette2-160", 50_000, False),
        ("imagenet-100", 50_000, False),
        ("tiny-imagenet", 50_000, False),
        ("uoft-cs/cifar10", 10_000, False),
    ],
)
def test_never_across_data_sets(tmp_path, data, images, known):
    config = {"data": data, "arch": "resnet50", "epochs": 100, "batch_size": 4096}
    config |= {"head_layers": 2, "temperature": 0.1, "lr_scaling": "linear", "blur": 0.5}
    config |= {"published": "simclr-v1-r50-100"}
    changed = {"test_images": images}
    found = compared_with(tmp_path / "run", "linear-simclr", "simclr", changed, **config)
    assert found == (([64.5], ["nothing known"]) if known else ([], []))


@pytest.mark.parametrize(
    "source, key",
    [
        ("uoft-cs/cifar10", "cifar10"),
        ("../shared/data/cifar10-jpeg", "cifar10"),
        ("uoft-cs/cifar100", "cifar100"),
        ("imagenette2-160", "imagenette"),
        ("imagenette2-320", ""),  # its images are others
        ("ILSVRC/imagenet-1k", "imagenet"),
        ("imagenet-1k-32x32", ""),
        ("demo", ""),
    ],
)
def test_names_of_data_sets(source, key):
    assert data_set(source) == key


def test_pretrained_elsewhere_is_another_figure(tmp_path):
    """ImageNet's encoder judged on CIFAR-10 is transfer, whatever the recipe says."""
    config = {"data": "ILSVRC/imagenet-1k", "arch": "resnet18", "stem": "cifar"}
    config |= {"batch_size": 512, "epochs": 1000, "published": "simclr-cifar10-r18-1000"}
    judged_on = {"data": "uoft-cs/cifar10"}
    found = compared_with(tmp_path / "a", "linear-simclr", "simclr", judged_on, **config)
    assert found == ([], [])
    config |= {"arch": "resnet50", "batch_size": 4096, "stem": "imagenet"}
    found = compared_with(tmp_path / "b", "transfer-linear", "simclr", judged_on, **config)
    assert found == ([90.6], ["nothing known"])


@pytest.mark.parametrize(
    "protocol, source, images, published",
    [
        ("transfer-linear-mean-per-class", "oxford-iiit-pet", 3_669, [90.4]),
        ("transfer-linear", "oxford-iiit-pet", 3_669, []),  # Top-1 is another measure
        ("transfer-linear-map11", "voc2007", 4_952, [82.5]),
        ("transfer-linear", "dtd", 1_880, [75.5]),
    ],
)
def test_transfer_by_the_measure_of_its_data_set(tmp_path, protocol, source, images, published):
    config = {"data": "ILSVRC/imagenet-1k", "arch": "resnet50", "stem": "imagenet"}
    config |= {"batch_size": 4096, "epochs": 1000, "published": "byol-r50-1000"}
    judged_on = {"data": source, "test_images": images}
    found = compared_with(tmp_path / "a", protocol, "byol", judged_on, **config)
    assert found == (published, ["nothing known"] * len(published))


def test_labels_that_were_drawn_are_said(tmp_path):
    config = {"data": "ILSVRC/imagenet-1k", "arch": "resnet50", "stem": "imagenet", "norm": "bn"}
    config |= {"batch_size": 4096, "epochs": 1000, "published": "byol-r50-1000"}
    other, listed = "not the official list of labels", {"subset": "x"}
    for i, (more, said) in enumerate(
        [
            ({"train_images": 12_811}, other),
            (listed | {"train_images": 12_000}, other),
            (listed | {"train_images": 12_811}, "nothing known"),
            (
                listed | {"train_images": 12_811, "probe_batch_size": 1024},
                "BatchNorm over parts of 256",
            ),
        ]
    ):
        changed = {"test_images": 50_000, "labels": "ab12", **more}
        found = compared_with(tmp_path / f"run{i}", "finetune-1-byol", "byol", changed, **config)
        assert found == ([53.2], [said])


def test_what_a_run_and_a_judgement_changed_is_said(tmp_path):
    """Flags of the pretraining command, and settings of the judgement that are not its own."""
    key = {"published": "moco-cifar10-asym-200", "weight_decay": 0.1}
    run = made(tmp_path / "run", "moco", "cifar10", **NOTEBOOK, epochs=200, **key)
    config = json.loads((run / "config.json").read_text())
    config["launches"][0]["command"] += " --weight-decay=0.1 --log-every 5 --temperature 0.1"
    (run / "config.json").write_text(json.dumps(config))
    judged(run, "knn200-output", changed={"epochs": 1, "base_lr": 0.5})
    [row] = rows(run)
    [known] = compare.published_for(row)
    said = "weight decay 0.1; judged with epochs 1; judged with base lr 0.5"
    assert compare.deviations(row, known) == said
    assert compare.columns([row]) == ["kNN (k 200) on the head's output, epochs 1, base lr 0.5"]


def test_a_changed_protocol_has_a_column_of_its_own(tmp_path):
    runs = [made(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2)]
    judged(runs[0], "finetune-100-simclr", top1=70.0)
    judged(runs[1], "finetune-100-simclr", top1=60.0, changed={"epochs": 3})
    head, line = compare.overview(rows(*runs))
    assert head[1:] == [
        f"fine-tuned, all labels (SimCLR's protocol){x}" for x in ("", ", epochs 3")
    ]
    assert line[1:] == ["70.0 ± 1.7", "60.0 ± 1.7"]


def test_other_weights_in_a_runs_folder_are_kept(tmp_path, command):
    run = made(tmp_path / "run", "moco")
    judged(run, "knn20")
    other = dict.fromkeys(("method", "recipe", "epochs", "published"))
    judged(run, "knn20", "torchvision:resnet50=w.pth", **other, encoder="resnet50")
    command(run, "--keep", tmp_path / "kept" / "results")
    assert len(list((tmp_path / "kept" / "results").iterdir())) == 2
    command("--results", tmp_path / "kept" / "results")
    page = (tmp_path / "kept" / "RESULTS.md").read_text()
    assert "None" not in page and "torchvision:resnet50=w.pth" in page


def test_what_is_to_be_known_of_a_published_figure_is_said(tmp_path):
    key = {"published": "moco-cifar10-asym-200"}
    run = made(tmp_path / "run", "moco", "cifar10", **NOTEBOOK, epochs=200, **key)
    judged(run, "knn200", top1=85.0)
    assert "best epoch on test" in str(compare.figures(rows(run)))


def test_a_log_that_a_kill_cut_short_is_read(tmp_path):
    run = made(tmp_path / "run")
    with (run / "timings.jsonl").open("a") as file:
        file.write('{"step": 20, "pairs')
    assert compare.cost(run)["pairs_per_second"] == 580.0


def test_only_what_a_method_learned_is_held_against_anything(tmp_path):
    run = made(tmp_path / "run", "moco", **NOTEBOOK, epochs=200, published="moco-cifar10-asym-200")
    judged(run, "knn200-output", "random")
    assert [compare.published_for(row) for row in rows(run)] == [[]]


def test_the_table_beside_what_was_published(tmp_path, command):
    key = {"published": "moco-cifar10-asym-200"}
    run = made(tmp_path / "run", "moco", "cifar10", **NOTEBOOK, epochs=200, **key)
    judged(run, "knn200-output", top1=81.4)
    judged(run, "knn200", top1=85.0)
    head, *lines = compare.beside_published(rows(run))
    by_protocol = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    line = by_protocol["kNN (k 200) on the head's output"]
    assert (line["measured"], line["published"]) == ("81.4 ± 1.7", "82.6")
    assert line["difference"] == "-1.2" and line["source"].startswith("notebook")
    other = by_protocol["kNN (k 200)"]  # on features, as lightly's
    assert other["published"] == "84.7" and "best epoch on test" in other["source"]
    shown = command(run)
    assert "-1.2" in shown and "not compared with" not in shown


def test_a_figure_without_its_protocol_is_named_and_not_compared(tmp_path, command):
    key = {"published": "simclr-cifar10-r18-1000"}
    run = made(tmp_path / "run", "simclr", "cifar10", **CIFAR, epochs=1000, **key)
    judged(run, "linear-features", top1=89.0)
    assert len(compare.beside_published(rows(run))) == 1
    assert "not compared with SimCLR's 91.0 (README-S): that is linear" in command(run)
    judged(run, "linear-simclr", top1=90.0)
    assert "not compared with" not in command(run)


# ---- kept results and RESULTS.md -----------------------------------------------------------------


def test_seeds_are_told_from_other_settings(tmp_path):
    for i, (seed, batch) in enumerate([(1, 256), (2, 256), (1, 128)]):
        judged(made(tmp_path / f"run{i}", seed=seed, batch_size=batch), "knn20", top1=70.0 + i)
    found = rows(*(tmp_path / f"run{i}" for i in range(3)))
    names = [f"SimCLR demo, 39 epochs (batch size {batch})" for batch in (256, 256, 128)]
    assert [row["name"] for row in found] == names
    table = cells(compare.overview(found))
    assert table[names[0], "kNN (k 20)"] == "70.5, sd 0.7 over 2 seeds (70.0, 71.0)"
    assert table[names[2], "kNN (k 20)"] == "72.0 ± 1.7"


def test_baselines_of_two_networks_are_two(tmp_path):
    for arch in ("resnet18", "resnet50"):
        judged(made(tmp_path / arch, arch=arch, out=arch), "knn20", "random")
        judged(tmp_path / arch, "knn20", "pixels")
    found, note = compare.without_repeats(rows(tmp_path / "resnet18", tmp_path / "resnet50"))
    names = [row["name"] for row in found]
    assert sorted(names) == [
        "random encoder (encoder resnet18)",
        "random encoder (encoder resnet50)",
        "raw pixels",
    ]
    assert "raw pixels" in note


@pytest.mark.parametrize(
    "text, known",
    [
        ("python -m a --data /home/me/cifar10-jpeg --out runs/x", "--data cifar10-jpeg --out runs"),
        ("--data ../shared/data/cifar10-jpeg", "--data cifar10-jpeg"),
        ("--data ./here", "--data here"),
        ("--data=/home/me/x", "--data=x"),
        ("--data '/home/my images/the set' --seed 2", "--data 'the set' --seed 2"),
        ("--out ~/runs/x", "--out x"),
        ("/data", "data"),
        ("/tmp/x/", ""),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("runs/simclr", "runs/simclr"),
        ("CPU (2 cores)", "CPU (2 cores)"),
    ],
)
def test_folders_of_the_machine_are_left_out(text, known):
    shown = compare.public({"a": [text]})["a"][0]
    assert known in shown and "home" not in shown and "shared" not in shown
    assert compare.public(shown) == shown


def test_kept_results_make_the_page(tmp_path, three, command, monkeypatch):
    """The page holds every figure once, no folder of the machine, and is always the same."""
    config = NOTEBOOK | {"published": "moco-cifar10-asym-200", "epochs": 200}
    config["data"] = str(tmp_path / "images" / "cifar10-jpeg")
    for seed in (1, 2):
        run = made(tmp_path / f"c{seed}", "moco", "cifar10", **config, seed=seed)
        judged(run, "knn200-output", top1=81.0 + seed)
        command(run, "--keep", tmp_path / "kept" / "results")
    command(*three, "--keep", tmp_path / "kept" / "results")
    record = {"title": "Views, one core", "figures": {"images/s": 1234.5, "against": "torchvision"}}
    record |= {"command": "python tests/benchmarks/throughput.py", **AT}
    files = tmp_path / "kept" / "results"
    (files / "zz.json").write_text(json.dumps(record))
    assert len(list(files.iterdir())) == 3 * 10 + 2 + 2 + 1
    command("--results", files)
    page = (tmp_path / "kept" / "RESULTS.md").read_text()
    assert str(tmp_path) not in page and str(tmp_path) not in "".join(
        path.read_text() for path in files.iterdir()
    )
    assert "82.5, sd 0.7 over 2 seeds (82.0, 83.0) | 82.6 (notebook" in page
    assert ") | JPEG copy of the data |" in page
    assert page.count("| raw pixels, SimCLR's input |") == 3 and page.count("## ") == 3
    assert page.count("| raw pixels, BYOL's input |") == 3 and "| raw pixels |" not in page
    assert "| MoCo cifar10, 200 epochs | 1 | " in page and "580 | 1.2 GB | CPU (2 cores) |" in page
    assert "| Views, one core | images/s: 1,234; against: torchvision | CPU (2 cores) |" in page
    widest = max(line.count(" | ") for line in page.splitlines())
    assert widest <= 6
    monkeypatch.chdir(tmp_path)
    command("--results", files)
    assert (tmp_path / "kept" / "RESULTS.md").read_text() == page


def test_another_setting_is_another_file(tmp_path, command):
    for batch in (128, 256):
        run = made(tmp_path / str(batch), batch_size=batch)
        judged(run, "knn20")
        command(run, "--keep", tmp_path / "kept")
        command(run, "--keep", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def older(run):
    """A run's folder as older versions wrote it."""
    record = json.loads((run / "config.json").read_text())
    config = record["config"]
    config |= {"test_size": config.pop("eval_size"), "estimate": False, "profile": 0}
    config["cache_chunk"] = config.pop("grad_cache_chunk")
    del record["overridden"]
    (run / "config.json").write_text(json.dumps(record))
    for path in (run / "results").iterdir():
        row = json.loads(path.read_text())
        name = row.pop("encoder")
        stem = {"arch": name.removesuffix("-cifar"), "stem": "cifar"}
        path.write_text(json.dumps(row | stem))
    return run


def of_two_seeds(folder, **config):
    """Runs of seeds 1 and 2, each with a judgement of its encoder and of a baseline."""
    config = NOTEBOOK | {"epochs": 200, "published": "moco-cifar10-asym-200"} | config
    config = {"eval_size": 32, "grad_cache_chunk": 0} | config
    for seed in (1, 2):
        run = made(folder / f"run{seed}", "moco", "cifar10", **config, seed=seed)
        record = json.loads((run / "config.json").read_text()) | {"overridden": []}
        (run / "config.json").write_text(json.dumps(record))
        for subject in ("encoder", "random"):
            judged(run, "knn200-output", subject, top1=81.0 + seed)
        yield run


def test_records_of_older_versions_make_the_same_page(tmp_path, command):
    """They have a network's name and stem apart, and settings under their former names."""
    for run in of_two_seeds(tmp_path / "new"):
        command(run, "--keep", tmp_path / "new" / "results")
    for run in map(older, of_two_seeds(tmp_path / "old")):
        command(run, "--keep", tmp_path / "old" / "results")
    pages = []
    for folder in (tmp_path / "new", tmp_path / "old"):
        command("--results", folder / "results")
        pages.append((folder / "RESULTS.md").read_text())
    assert "| ResNet-18, cifar stem | kNN (k 200) on the head's output | 82.5, sd 0.7" in pages[0]
    assert "82.6 (notebook" in pages[0] and pages[0] == pages[1]


def test_what_is_measured_again_replaces_an_older_record(tmp_path, command):
    for run in map(older, of_two_seeds(tmp_path / "old")):
        command(run, "--keep", tmp_path / "results")
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert len(names) == 4
    for run in of_two_seeds(tmp_path / "new"):
        command(run, "--keep", tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    assert all('"encoder"' in path.read_text() for path in (tmp_path / "results").iterdir())
    for run in of_two_seeds(tmp_path / "other", eval_size=40):
        command(run, "--keep", tmp_path / "results")
    assert len(list((tmp_path / "results").iterdir())) == 4 + 2  # the baselines are the same
    found = {row["name"] for row in rows(*(tmp_path / name / "run1" for name in ("old", "other")))}
    moco = "MoCo cifar10, 200 epochs"
    assert found == {f"{moco} (eval size 32)", f"{moco} (eval size 40)", "random encoder"}


def test_the_records_of_this_repository_make_its_page(tmp_path, command):
    """Every table of RESULTS.md."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    command("--results", tmp_path / "results")
    tables = [
        [line for line in (folder / "RESULTS.md").read_text().splitlines() if "|" in line]
        for folder in (tmp_path, ROOT)
    ]
    assert len(tables[0]) > 100 and tables[0] == tables[1]


def test_a_wrong_record_is_one_line(tmp_path, command):
    with pytest.raises(UserError, match="no results in it"):
        compare.read_records(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"title": "x", "figures": {}, "device": "CPU"}))
    with pytest.raises(UserError, match=r"a\.json: lacks command, commit"):
        compare.read_records(tmp_path)


def test_renamed_keys_are_those_of_the_methods():
    configs = [importlib.import_module(f"{method}.config").Config for method in METHODS]
    assert {k: v for kind in configs for k, v in old_names(kind).items()} == compare.RENAMED
