"""Tables of what was measured, beside what was published; RESULTS.md from its records."""

import json
import shutil

import pytest
from PIL import Image

import eval.compare
from eval.results import page
from eval.results.compare import (
    as_text,
    beside_published,
    columns,
    differences,
    named,
    notes,
    one_baseline,
    overview,
    published_for,
)
from eval.results.published import data_set
from eval.results.record import cost, results_of
from tests.eval.harness import judged, save_run
from tests.helpers import ROOT, evaluate

KNN = {"k": 200, "temperature": 0.1}
OUTPUT = {"settings": KNN, "layer": -1, "encoder": "resnet18-cifar"}  # as MoCo's notebook has it
CIFAR = {"data": "uoft-cs/cifar10", "batch_size": 512}
NOTEBOOK = CIFAR | {"head": "linear", "views": "notebook", "symmetric": False}


def made(folder, method="simclr", recipe="demo", overridden=(), **config):
    """A run's folder without judgements, of 39 epochs of the demo."""
    save_run(folder, **{"seed": 1, "batch_size": 256, "epochs": 39, "published": ""} | config)
    known = json.loads((folder / "config.json").read_text())
    known |= {"method": method, "recipe": recipe, "overridden": list(overridden)}
    (folder / "config.json").write_text(json.dumps(known))
    timing = {"step": 0, "pairs_per_second": 580.0, "data_wait": 0.1, "peak_memory_gb": 1.25}
    (folder / "timings.jsonl").write_text(json.dumps(timing) + "\n")
    return folder


LINEAR = {"task": "linear", "protocol": "features", "settings": {}}
SUPERVISED = {"task": "finetune", "protocol": "simclr", "settings": {"label_percent": 100}}


@pytest.fixture
def three(tmp_path):
    """A demo run of each method, each with its own baselines."""
    runs = []
    for i, method in enumerate(("byol", "simclr", "moco")):
        run = made(tmp_path / f"{method}-demo", method)
        for j, judgement in enumerate(({}, {"settings": KNN}, LINEAR)):
            judged(run, 60 + 10 * i + j, **judgement)
            judged(run, 20 + i, subject="pixels", **judgement)
            judged(run, 30 - i, subject="random", **judgement)
        judged(run, 95 + i, subject="random", **SUPERVISED)
        runs.append(run)
    judged(runs[2], 55, layer=-1)
    return runs


@pytest.fixture
def command(capsys):
    def call(*argv):
        evaluate(eval.compare, *argv)
        return capsys.readouterr().out

    return call


def lines(*runs):
    return named([result for run in runs for result in results_of(run)[0]])


def cells(table):
    """{(line, column): cell} of a table."""
    head, *body = table
    return {(line[0], name): cell for line in body for name, cell in zip(head, line, strict=True)}


# ---- one table of several runs -------------------------------------------------------------------


def test_one_table_for_all_methods(three):
    shown, note = one_baseline(lines(*three))
    table = overview(shown)
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
    assert found["BYOL demo, 39 epochs", "kNN (k 20)"] == "60.0 ± 1.7"
    assert found["MoCo demo, 39 epochs", "linear (on features)"] == "82.0 ± 1.7"
    # each baseline once, by its best figure
    assert found["raw pixels", "kNN (k 200)"] == "22.0 ± 1.7"
    assert found["random encoder", "linear (on features)"] == "30.0 ± 1.7"
    assert (
        found["supervised baseline", "fine-tuned, all labels (SimCLR's protocol)"] == "97.0 ± 1.7"
    )
    assert note.startswith("raw pixels, random encoder, supervised baseline: the best")
    assert one_baseline(lines(three[0])) == (lines(three[0]), "")
    # the head's output has a column of its own
    assert found["MoCo demo, 39 epochs", "kNN (k 20) on the head's output"] == "55.0 ± 1.7"
    assert found["SimCLR demo, 39 epochs", "kNN (k 20) on the head's output"] == ""


def test_the_command_on_three_runs(three, command):
    shown = command(*three)
    assert "On demo, 10,000 test images" in shown and "the best of what the runs'" in shown
    assert max(map(len, shown.splitlines())) <= 110
    text = (three[0] / "compare.md").read_text()
    assert text.count("| raw pixels |") == 1 and "| MoCo demo, 39 epochs |" in text
    with Image.open(three[0] / "compare.png") as picture:
        assert picture.width > 500 and picture.height > 500


def test_an_older_record_is_left_out_and_named(three, capsys):
    old = {"protocol": "knn20", "top1": 50.0, "judged": {"command": "python -m eval.knn runs/x"}}
    (three[0] / "results" / "old.json").write_text(json.dumps(old))
    evaluate(eval.compare, *three)
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if "old.json" in line]
    assert line.startswith("left out: ") and line.endswith("them: python -m eval.knn runs/x")
    assert "BYOL demo, 39 epochs" in shown.out


def test_long_headings_and_cells_are_wrapped():
    text = as_text([["", "words in a heading"], ["a", "12.5"], ["b", "said " * 20]])
    found = text.splitlines()
    assert max(map(len, found)) <= 43 and text.count("said") == 20
    assert found[0].strip() == "words in a heading" and set(found[1]) == {"-"}
    short = as_text([["", "words in a heading"], ["a", "12.5"]]).splitlines()
    assert [line.strip() for line in short[:2]] == ["words in a", "heading"]
    assert as_text([["", "k"], ["", ""], ["a", "1"]]).splitlines()[-1].split() == ["a", "1"]


# ---- short names ---------------------------------------------------------------------------------


def test_seeds_share_a_line_and_other_settings_do_not(tmp_path):
    for i, (seed, batch) in enumerate([(1, 256), (2, 256), (1, 128)]):
        judged(made(tmp_path / f"run{i}", seed=seed, batch_size=batch, epochs=10), 70.0 + i)
    table = overview(lines(*(tmp_path / f"run{i}" for i in range(3))))
    assert table[1:] == [
        ["SimCLR demo, 10 epochs, batch 128", "72.0 ± 1.7"],
        ["SimCLR demo, 10 epochs, batch 256", "70.5, sd 0.7 (70.0, 71.0)"],
    ]


def test_few_settings_tell_runs_apart(tmp_path):
    """Those of the recipes' names and the seeds aside, two of four are enough here."""
    settings = [
        ("lars", 0.5, 1, 0.2),
        ("sgd", 0.1, 1, 0.2),
        ("sgd", 0.1, 1, 0.3),
        ("sgd", 2, 2, 0.2),
    ]
    for i, (optimizer, rate, decay, area) in enumerate(settings):
        config = {"optimizer": optimizer, "base_lr": rate, "decay": decay, "crop_min_area": area}
        judged(made(tmp_path / f"{i}", **config, symmetric=True, seed=i))
    judged(made(tmp_path / "older", optimizer="lars", base_lr=0.5, decay=1, crop_min_area=0.2))
    found = lines(*sorted(tmp_path.iterdir()))
    title = "SimCLR demo, 39 epochs"
    assert sorted(line.name for line in found) == [
        f"{title}, base lr 0.1, crops from 0.2",
        f"{title}, base lr 0.1, crops from 0.3",
        *[f"{title}, base lr 0.5, crops from 0.2"] * 2,  # a setting that one lacks parts nothing
        f"{title}, base lr 2, crops from 0.2",
    ]


def test_baselines_of_two_networks_are_two(tmp_path):
    for network in ("resnet18", "resnet50"):
        run = made(tmp_path / network)
        judged(run, subject="random", encoder=network)
        judged(run, subject="pixels", encoder=network)
    found, note = one_baseline(lines(tmp_path / "resnet18", tmp_path / "resnet50"))
    names = [line.name for line in found]
    networks = [f"random encoder, network {name}" for name in ("resnet18", "resnet50")]
    assert sorted(names) == [*networks, "raw pixels"] and "raw pixels" in note


def test_a_column_for_each_way_to_judge(tmp_path):
    run, changed = made(tmp_path / "run"), {"epochs": 3, "base_lr": 0.5}
    judged(run, **SUPERVISED)
    judged(run, **SUPERVISED, changed=changed)
    judged(run, **SUPERVISED, changed=changed, deviations=("views not clipped",))
    judged(run, **SUPERVISED | {"settings": {"label_percent": 1, "seed": 2}})
    judged(run, settings={"k": 20, "temperature": 0.07})
    judged(run)
    judged(run, task="transfer", protocol="logistic", metric="map11", settings={})
    judged(run, task="segment", protocol="voc", metric="mean_iou", settings={}, layer=2)
    full = "fine-tuned, all labels (SimCLR's protocol)"
    assert columns(lines(run)) == [
        "kNN (k 20), temperature 0.07",
        "kNN (k 20), temperature 0.1",
        "fine-tuned, 1 % of labels (SimCLR's protocol), judged with seed 2",
        full,
        f"{full}, 3 epochs, base lr 0.5",
        f"{full}, 3 epochs, base lr 0.5, views not clipped",
        "transfer (logistic regression), 11-point mAP",
        "segment (voc), mean iou on the head's layer 2",
    ]


def test_other_splits_and_labels_are_other_columns(tmp_path):
    run = made(tmp_path / "run", label_depth=1)
    for read in ({"label_depth": 1}, {"test_split": "val"}, {"label_depth": 2}):
        judged(run, columns=read)
    plain = "kNN (k 20)"
    assert columns(lines(run)) == [plain, f"{plain}, label depth 2", f"{plain}, test split val"]


# ---- beside what was published -------------------------------------------------------------------


def compared_with(folder, method, judgement, overridden=(), **config):
    """(figures that a measurement is compared with, what it differs in)."""
    run = made(folder, method, "cifar10", overridden, **config)
    judged(run, **judgement)
    ((result,), _) = results_of(run)
    found = published_for(result)
    said = ["; ".join(differences(result, row) + notes(result, row)) for row in found]
    return [row.value for row in found], said


@pytest.mark.parametrize(
    "epochs, published, differs",
    [(200, 82.6, ""), (400, 86.3, ""), (800, 88.7, ""), (10, 82.6, "10 epochs, not 200")],
)
def test_the_row_of_the_same_epochs(tmp_path, epochs, published, differs):
    config = NOTEBOOK | {"epochs": epochs, "published": "moco-cifar10-asym-200"}
    found = compared_with(tmp_path / "run", "moco", OUTPUT, **config)
    assert found == ([published], [differs])


def test_the_variant_is_the_runs_and_not_the_recipes(tmp_path):
    config = NOTEBOOK | {"epochs": 400, "symmetric": True, "published": "moco-cifar10-asym-200"}
    assert compared_with(tmp_path / "run", "moco", OUTPUT, **config)[0] == [88.5]
    config |= {"epochs": 10, "views": "v2"}
    found = compared_with(tmp_path / "other", "moco", OUTPUT, **config)
    said = "10 epochs, not 200; symmetric True, not False; views v2, not notebook"
    assert found == ([82.6], [said])


def test_batch_network_stem_and_copies_are_said(tmp_path):
    config = CIFAR | {"epochs": 1000, "published": "simclr-cifar10-r18-1000"}
    config |= {"data": "../shared/cifar10-jpeg", "batch_size": 256}
    linear = {"task": "linear", "protocol": "simclr", "settings": {}, "encoder": "resnet18"}
    found = compared_with(tmp_path / "run", "simclr", linear, **config)
    said = "batch 256, not 512; ImageNet stem; JPEG copy of the data"
    assert found == ([91.0], [f"{said}; no projection in the first shortcut"])
    linear["encoder"] = "resnet50"
    found = compared_with(tmp_path / "r50", "simclr", linear, **config)
    assert "ResNet-50, not ResNet-18" in str(found)


@pytest.mark.parametrize(
    "judgement, method, key",
    [
        (LINEAR, "simclr", "simclr-cifar10-r18-1000"),
        ({"task": "linear", "protocol": "moco"}, "simclr", "simclr-cifar10-r18-1000"),
        ({"settings": KNN}, "moco", "moco-cifar10-asym-200"),
        ({"layer": -1}, "moco", "moco-cifar10-asym-200"),  # k 20
        ({"layer": -1, "settings": KNN | {"temperature": 0.2}}, "moco", "moco-cifar10-asym-200"),
        ({"task": "linear", "protocol": "moco"}, "moco", "moco-cifar10-sym-800-linear"),
        (OUTPUT, "simclr", "moco-cifar10-asym-200"),
        (OUTPUT | {"subject": "random"}, "moco", "moco-cifar10-asym-200"),
        (OUTPUT | {"metric": "map11"}, "moco", "moco-cifar10-asym-200"),
        (SUPERVISED, "byol", "byol-r50-finetune-100"),
    ],
)
def test_never_across_protocols_or_methods(tmp_path, judgement, method, key):
    config = NOTEBOOK | {"epochs": 1000, "published": key}
    assert compared_with(tmp_path / "run", method, judgement, **config) == ([], [])


IMAGENET = {"data": "ILSVRC/imagenet-1k", "batch_size": 4096}
R50 = {"encoder": "resnet50", "test_images": 50_000}


@pytest.mark.parametrize(
    "data, images, known",
    [
        ("ILSVRC/imagenet-1k", 50_000, True),
        ("/data/ImageNet", 50_000, True),
        ("/data/imagenet", 100_000, False),  # a fifth of train, held out
        ("imagenette2-160", 3_925, False),
        ("/data/imagenet/imagenette2-160", 50_000, False),
        ("uoft-cs/cifar10", 10_000, False),
    ],
)
def test_never_across_data_sets(tmp_path, data, images, known):
    config = IMAGENET | {"data": data, "epochs": 100, "published": "simclr-v1-r50-100"}
    config |= {"head_layers": 2, "temperature": 0.1, "lr_scaling": "linear", "blur": 0.5}
    linear = R50 | {"task": "linear", "protocol": "simclr", "test_images": images}
    found = compared_with(tmp_path / "run", "simclr", linear, **config)
    assert found == (([64.5], [""]) if known else ([], []))


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
        ("imagenet-100", ""),
        ("tiny-imagenet", ""),
        ("demo", ""),
    ],
)
def test_names_of_data_sets(source, key):
    assert data_set(source) == key


@pytest.mark.parametrize(
    "metric, source, images, published",
    [
        ("mean_per_class", "oxford-iiit-pet", 3_669, [90.4]),
        ("top1", "oxford-iiit-pet", 3_669, []),  # Top-1 is another measure
        ("map11", "voc2007", 4_952, [82.5]),
        ("top1", "dtd", 1_880, [75.5]),
    ],
)
def test_transfer_by_the_measure_of_its_data_set(tmp_path, metric, source, images, published):
    config = IMAGENET | {"epochs": 1000, "published": "byol-r50-1000"}
    transfer = {"task": "transfer", "protocol": "logistic", "settings": {}, "encoder": "resnet50"}
    transfer |= {"metric": metric, "data": source, "test_images": images}
    found = compared_with(tmp_path / "a", "byol", transfer, **config)
    assert found == (published, [""] * len(published))
    # and an encoder that was pretrained elsewhere is compared by this alone
    transfer |= {"task": "linear", "protocol": "byol"}
    assert compared_with(tmp_path / "b", "byol", transfer, **config) == ([], [])


def test_labels_that_were_drawn_and_deviations_are_said(tmp_path):
    config = IMAGENET | {"epochs": 1000, "published": "byol-r50-1000", "norm": "bn"}
    other, parts = "not the official list of labels", "BatchNorm over parts of 256"
    for i, (images, subset, deviations, said) in enumerate(
        [
            (12_811, "", (), other),
            (12_000, "x", (), other),
            (12_811, "x", (), ""),
            (12_811, "x", (parts,), parts),
        ]
    ):
        tuned = R50 | {"task": "finetune", "protocol": "byol", "train_images": images}
        tuned |= {"settings": {"label_percent": 1, "subset": subset}, "deviations": deviations}
        found = compared_with(tmp_path / f"run{i}", "byol", tuned, **config)
        assert found == ([53.2], [said])


def test_what_a_run_and_a_judgement_changed_is_said(tmp_path):
    config = NOTEBOOK | {"epochs": 200, "published": "moco-cifar10-asym-200", "weight_decay": 0.1}
    overridden = ["weight_decay", "log_every", "temperature", "epochs"]  # some say nothing of it
    judgement = OUTPUT | {"changed": {"epochs": 1, "base_lr": 0.5}}
    found = compared_with(tmp_path / "run", "moco", judgement, overridden, **config)
    assert found == ([82.6], ["weight decay 0.1; judged with 1 epoch; judged with base lr 0.5"])


def test_the_table_beside_what_was_published(tmp_path, command):
    symmetric = NOTEBOOK | {"symmetric": True}
    runs = [
        made(tmp_path / f"{seed}", "moco", "cifar10-symmetric", **symmetric, epochs=200, seed=seed)
        for seed in (1, 2)
    ]
    for run in runs:
        judged(run, 83.1 + int(run.name), **OUTPUT)
    judged(runs[0], 85.0, settings=KNN, encoder="resnet18-cifar")
    (head, *body), remarks = beside_published(lines(*runs))
    by_protocol = {line[1]: dict(zip(head, line, strict=True)) for line in body}
    line = by_protocol["kNN (k 200) on the head's output"]
    assert (line["measured"], line["published"]) == ("84.6, sd 0.7 (84.1, 85.1)", "85.3")
    assert line["difference"] == "-0.7" and line["source"] == "notebook"
    assert by_protocol["kNN (k 200)"]["published"] == "84.7"  # on features, as lightly's
    assert any("bank of 8192; best epoch on test" in remark for remark in remarks)
    assert "notebook is colab/moco_cifar10_demo.ipynb" in remarks[-1]
    shown = command(*runs)
    assert "-0.7" in shown and "not compared with" not in shown


def test_dkobaks_figures_stand_beside_a_hundred_epochs_alone(tmp_path):
    config = CIFAR | {"published": "simclr-cifar10-r18-1000"}
    for epochs, figures in ((100, [85.6]), (99.6, [85.6]), (200, []), (50, [])):
        found = compared_with(
            tmp_path / f"{epochs}", "simclr", LINEAR | {"encoder": "resnet18-cifar"},
            epochs=epochs, **config,
        )  # fmt: skip
        assert found[0] == figures and found[1] == [""] * len(figures)


def test_checks_and_speeds_have_parts_of_their_own():
    """Those with the same figures share a table, and a row has a figure once."""
    about = {"kind": "measurement", "device": "NVIDIA H100 80GB HBM3", "commit": "0123456789ab+"}
    program = "python -m tests.benchmarks.right losses"
    figures = {"largest_difference": 1e-12, "steps": 5}
    records = [about | {"title": "losses", "command": program, "figures": figures}]
    for name, more in (("a", {}), ("b", {}), ("c", {"seconds_per_epoch": 4.25})):
        speed = {"pairs_per_second": 10_800.0, "data_wait": 0.01} | more
        command = f"python -m simclr.pretrain cifar10 --out {name}"
        records.append(about | {"title": name * 82, "command": command, "figures": speed})
    text = page.results_page(records)
    assert "How fast beside others" not in text and max(map(len, text.splitlines())) <= 200
    assert "- Losses: largest difference 1e-12; steps 5 (NVIDIA H100" in text
    table = text[text.index("## How fast are the commands?") :]
    assert table.count("| --- |") == 2 and table.count("| 10,800 | 0.01 | NVIDIA") == 2
    assert "| 10,800 | 0.01 | 4.25 | NVIDIA" in table and table.count("simclr.pretrain") == 3


def test_a_figure_without_its_protocol_is_named_and_not_compared(tmp_path, command):
    key = {"published": "simclr-cifar10-r18-1000"}
    run = made(tmp_path / "run", "simclr", "cifar10", **CIFAR, epochs=500, **key)
    judged(run, 89.0, **LINEAR)
    assert len(beside_published(lines(run))[0]) == 1
    shown = " ".join(command(run).split())
    assert "not compared with SimCLR's 91.0 (README-S): that is linear (SimCLR's protocol)" in shown
    judged(run, 90.0, **LINEAR | {"protocol": "simclr"})
    assert "not compared with" not in command(run)


def test_a_log_that_a_kill_cut_short_is_read(tmp_path):
    run = made(tmp_path / "run")
    with (run / "timings.jsonl").open("a") as file:
        file.write('{"step": 20, "pairs')
    assert cost(run)["pairs_per_second"] == 580.0


# ---- kept results and RESULTS.md -----------------------------------------------------------------


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
    shown = page.public({"a": [text]})["a"][0]
    assert known in shown and "home" not in shown and "shared" not in shown
    assert page.public(shown) == shown


def test_kept_results_make_the_page(tmp_path, three, command, monkeypatch):
    """The page holds every figure once, no folder of the machine, and is always the same."""
    files = tmp_path / "kept" / "results"
    config = NOTEBOOK | {"published": "moco-cifar10-asym-200", "epochs": 200}
    config["data"] = str(tmp_path / "images" / "cifar10-jpeg")
    for seed in (1, 2):
        run = made(tmp_path / f"c{seed}", "moco", "cifar10", **config, seed=seed)
        judged(run, 81.0 + seed, **OUTPUT)
        command(run, "--keep", files)
    for _ in range(2):  # what is measured again replaces its record
        command(*three, "--keep", files)
    figures = {"images/s": {"ours": 1234.5, "torchvision": 99.0}, "no row": 7}
    record = {"kind": "measurement", "title": "views, one core", "figures": figures}
    record |= {"command": "python tests/benchmarks/throughput.py", "commit": "a" * 40}
    (files / "zz.json").write_text(json.dumps(record | {"device": "CPU (2 cores)"}))
    assert len(list(files.iterdir())) == 3 * 10 + 1 + 2 + 1
    command("--results", files)
    text = (tmp_path / "kept" / "RESULTS.md").read_text()
    assert str(tmp_path) not in text and str(tmp_path) not in "".join(
        path.read_text() for path in files.iterdir()
    )
    questions = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert questions == [
        "What do the demos learn?",
        "How near is CIFAR-10?",
        "What does it cost?",
        "How fast beside others?",
    ]
    assert "| 82.5, sd 0.7 (82.0, 83.0) | 82.6 | -0.1 | notebook |" in text
    assert "against 82.6 (notebook): JPEG copy of the data" in text
    assert text.count("| raw pixels | 22.0 ± 1.7 | 22.0 ± 1.7 | 22.0 ± 1.7 |") == 1
    assert "| MoCo cifar10, 200 epochs | 1, 2 | " in text
    assert "580 | 10.0% | 1.2 GB | CPU |" in text
    assert "Not measured yet: SimCLR cifar10, 200 epochs; MoCo cifar10-symmetric, 200" in text
    assert "### Views, one core" in text and "| images/s | 1,234 | 99 |" in text
    assert max(map(len, text.splitlines())) <= 200
    monkeypatch.chdir(tmp_path)
    command("--results", files)
    assert (tmp_path / "kept" / "RESULTS.md").read_text() == text


def test_what_is_measured_again_replaces_its_record_though_settings_were_added(tmp_path, command):
    def kept(*runs):
        for run in runs:
            command(run, "--keep", tmp_path / "results")
        return len(list((tmp_path / "results").iterdir()))

    def runs(name, judge=KNN, **config):
        for seed in (1, 2):
            run = made(tmp_path / name / f"{seed}", seed=seed, **config)
            judged(run, settings=judge)
            judged(run, subject="random")
            yield run

    assert kept(*runs("old")) == 2 + 1  # a baseline is that of any seed
    assert kept(*runs("new", added=1)) == 3  # the older ones lack the setting
    assert kept(*runs("precise", KNN | {"precision": "fp32"}, added=1)) == 3  # so do these
    assert kept(*runs("other", added=2)) == 3 + 3
    assert kept(*runs("bf16", KNN | {"precision": "bf16"}, added=1)) == 6 + 2


def test_other_weights_in_a_runs_folder_are_kept(tmp_path, command):
    run, kept = made(tmp_path / "run", "moco"), tmp_path / "kept" / "results"
    judged(run)
    nothing = dict.fromkeys(("method", "recipe", "epochs", "published", "seed", "pretrained_at"))
    weights = {"subject": "torchvision:resnet50=w.pth", "encoder": "resnet50", "run": {}}
    judged(run, **nothing, **weights, run_id="")
    command(run, "--keep", kept)
    assert len(list(kept.iterdir())) == 2
    command("--results", kept)
    text = (tmp_path / "kept" / "RESULTS.md").read_text()
    assert "None" not in text and "torchvision:resnet50=w.pth" in text


def test_the_records_of_this_repository_make_its_page(tmp_path, command):
    """RESULTS.md, byte for byte, with short lines."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    command("--results", tmp_path / "results")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == (ROOT / "RESULTS.md").read_text()
    assert text.count("\n| ") > 50 and max(map(len, text.splitlines())) <= 200


def test_a_wrong_record_is_one_line(tmp_path, command, capsys):
    def said():
        with pytest.raises(SystemExit) as caught:
            command("--results", tmp_path)
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "no results in it" in said()
    path, record = tmp_path / "a.json", {"kind": "measurement", "title": "x", "device": "CPU"}
    path.write_text(json.dumps(record | {"figures": {}}))
    assert "a.json: lacks command, commit" in said()
    path.write_text("[]")
    assert "a.json: not the record of a judgement" in said()
