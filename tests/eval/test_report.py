"""The page about a run: whole, escaped, asking nothing of the outside; looked at in a browser."""

import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import eval.compare
import eval.knn
from common.data import ImageSplit
from eval.results import report
from tests.eval.harness import judged, save_images, save_run
from tests.helpers import evaluate

HOSTILE = "<script>alert(1)<"  # a class name, as a folder's name may be
CLASSES = (HOSTILE, "b & c", 'd"e')


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on a small run, 60 labelled images and 24 to test; (its folder, the run's)."""
    folder = tmp_path_factory.mktemp("reported")
    source = save_images(folder / "source", CLASSES, 60, 24, size=(16, 20), gain=60)
    run = save_run(folder / "run <i>", data=str(source))
    metrics = [
        {"step": i, "loss": 3 - i / 10, "chance_loss": 4.0, "lr": 0.1, "uniformity": -1 - i}
        for i in range(0, 20, 5)
    ]
    metrics[2]["loss"] = float("nan")
    metrics[-1]["knn"] = 70.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    evaluate(eval.knn, run, "--k", "5", "--baselines", "random", "pixels")
    evaluate(eval.compare, run, "--report", folder / "page")
    evaluate(eval.compare, run, "--report", folder / "page")  # a second time does no harm
    return folder / "page", run


class Reader(HTMLParser):
    """Tags that are open, those that were seen, and all attributes; fails on wrong nesting."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def requests(text):
    """Everything in a page that a browser would fetch."""
    reader, asked = read(text), []
    for key, value in reader.attributes:
        if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            asked.append(value)
        asked += re.findall(r"url\(\s*['\"]?([^)'\"]*)", value or "")
    asked += re.findall(r"url\(\s*['\"]?([^)'\"]*)", text) + re.findall(r"@import[^;]*", text)
    asked += [tag for tag in reader.seen if tag in ("script", "link", "iframe", "object", "embed")]
    return [each for each in asked if not each.startswith("data:image/png;base64,")]


def test_nothing_is_asked_of_the_outside(page):
    text = (page[0] / "index.html").read_text()
    assert text.count("data:image/png") > 50
    assert requests(text) == []
    assert "http:" not in text and "https:" not in text


@pytest.mark.parametrize(
    "part",
    [
        '<img src="https://example.org/a.png">',
        '<link rel="stylesheet" href="style.css">',
        "<style>@import 'a.css';</style>",
        '<p style="background:url(//example.org/a.png)"></p>',
        '<svg><image href="a.png"/></svg>',
        "<script></script>",
    ],
)
def test_requests_are_seen(part):
    assert requests(part)


def test_what_comes_from_data_is_escaped(page):
    text = (page[0] / "index.html").read_text()
    reader = read(text)
    assert "script" not in reader.seen and "i" in reader.seen
    assert "<script" not in text and "run <i>" not in text
    assert HOSTILE in "".join(reader.text) and "run <i>" in "".join(reader.text)
    assert ("alt", HOSTILE) in reader.attributes and ("alt", 'd"e') in reader.attributes
    assert "<script" not in (page[0] / "report.md").read_text()


def test_the_page_has_its_parts(page):
    text = (page[0] / "index.html").read_text()
    for part in ("random encoder", "raw pixels", "the map of its features", "nearest neighbours"):
        assert part in text
    assert text.count('class="near"') == 10  # test images, each with its neighbours
    assert "what went wrong most" in text and "taken for" in text
    for key in ("loss", "lr", "knn", "uniformity", "pairs_per_second"):
        title = report.e(report.CHARTS[key])
        assert (f"<figcaption>{title}</figcaption>" in text) == (key != "pairs_per_second")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()
    lines = (page[0] / "report.md").read_text()
    assert "| raw pixels |" in lines and "| true class | taken for |" in lines


def test_the_projector_is_beside_the_run(page):
    """TensorBoard's own files: as many vectors as names, and one picture of all thumbnails."""
    folder = page[1] / "projector"
    (vectors,), (names,) = folder.rglob("tensors.tsv"), folder.rglob("metadata.tsv")
    assert len(vectors.read_text().splitlines()) == len(names.read_text().splitlines()) == 24
    (sprite,) = folder.rglob("sprite.png")
    with Image.open(sprite) as picture:
        assert picture.width == math.ceil(24**0.5) * report.SIDE
    assert (folder / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_without_labels_the_page_says_so(tmp_path, page):
    run = tmp_path / "run"
    shutil.copytree(page[1], run)
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat" / "a.png")
    config["config"]["data"] = str(tmp_path / "flat")
    (run / "config.json").write_text(json.dumps(config))
    shown, text = report.neighbours_html(run)
    assert "has no labels" in shown and text == ""


# ---- its figures ---------------------------------------------------------------------------------


def test_the_plane_is_the_principal_components():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 6, generator=generator) * torch.tensor([9.0, 4, 1, 1, 1, 1]) + 5
    flat, share = report.plane(features)
    covariance = torch.cov(features.double().T)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(torch.cov(flat.T), torch.diag(values[:2]), atol=1e-6, rtol=1e-6)
    assert share == pytest.approx((values[:2].sum() / values.sum()).item())
    assert report.plane(torch.ones(5, 3))[0].shape == (5, 2)
    assert report.plane(torch.randn(4, 1, generator=generator))[0].shape == (4, 2)


def classified(truth, predicted, classes=3):
    ranking = torch.tensor([[p, *(c for c in range(classes) if c != p)] for p in predicted])
    images = ImageSplit("test", [None] * len(truth), torch.tensor(truth), CLASSES[:classes])
    empty = torch.zeros(len(truth), 2)
    return report.Classified(images, images, empty, empty, images.labels, images.labels, ranking)


def test_confusions_are_counted():
    found = report.confusions(classified([0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 1, 2, 1]))
    assert found[0] == (1, 2, 2, 2) and set(found[1:]) == {(0, 1, 1, 1), (2, 1, 1, 6)}
    assert report.confusion_table(classified([1, 1, 1], [2, 2, 1]))[1] == [
        "b & c",
        'd"e',
        "2",
        "67%",
    ]
    assert report.confusions(classified([0, 1], [0, 1])) == []
    assert "Nothing went wrong" in report.confusion_html(classified([0, 1], [0, 1]))


def test_examples_take_turns():
    assert report.examples(torch.tensor([0, 0, 0, 1, 2, 2]), 5) == [0, 3, 4, 1, 5]
    assert report.examples(torch.tensor([1, 1]), 5) == [0, 1]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3.2, 17.9), (0.013, 0.014), (5, 5), (0, 0), (1e5, 3e6), (-0.2, -0.1)]
)
def test_ticks_are_round_and_reach_around(low, high):
    found = report.ticks(low, high)
    assert 3 <= len(found) <= 8 and found[0] <= low and found[-1] >= high
    steps = {f"{b - a:.6g}" for a, b in itertools.pairwise(found)}
    assert len(steps) == 1 and steps.pop().strip("0.")[0] in "125"


# ---- in a browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
QUIET += "--disable-background-networking --disable-component-update --disable-sync"
WIDTHS = (1280, 390)
MEASURE = """<script>addEventListener("load", () => {
  const page = document.documentElement, broken = [...document.images]
    .filter((image) => !image.naturalWidth).length
  parent.postMessage([page.scrollWidth, page.clientWidth, broken, document.images.length], "*")
})</script>"""
SAY = """<script>onmessage = (said) => { document.title += said.data.join(" ") + ";" }</script>"""


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """The report on records alone: long names, several seeds, other metrics, no encoder."""
    folder = tmp_path_factory.mktemp("long")
    for seed in (1, 2, 3):
        name = f"{'a-run-with-a-very-long-name-' * 5}{seed}"
        long = "a_recipe_with_a_name_that_nothing_parts_" * 3
        run = save_run(folder / name, seed=seed, data="ILSVRC/" + "imagenet_of_many_classes_" * 4)
        (run / "encoder.safetensors").unlink()
        known = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(known | {"recipe": long}))
        rows = [{"step": i, "loss": 123456.789 - i, "lr": 1e-9 * i} for i in range(9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for k in (1, 5, 20, 200, 2000):
            judged(run, 50.0 + seed, settings={"k": k})
        judged(run, 50.0 + seed, task="transfer", protocol="logistic", metric="mean_per_class")
        judged(run, 61.5, task="segmentation", protocol="x" * 60, metric="mean_iou", layer=3)
        judged(run, 0.5, subject=f"torchvision:{'w' * 90}.pth", settings={"k": 20})
        changed = {"epochs": 3, "base_lr": 0.05, "jitter": [0.4, 0.4, 0.2, 0.1]}
        judged(run, task="finetune", protocol="simclr", settings={}, changed=changed)
    runs = sorted(path for path in folder.iterdir())
    evaluate(eval.compare, *runs, "--out", folder / "out", "--report", folder / "page")
    return folder / "page"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("which, images", [("page", 50), ("long_page", 1)])
def test_in_a_browser_nothing_sticks_out(which, images, request, tmp_path):
    """No part is wider than the window, every picture shows, and something is drawn.

    500 px is the narrowest window of headless Chromium: each width is that of a frame.
    """
    made = request.getfixturevalue(which)
    text = ((made[0] if which == "page" else made) / "index.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"))
    frame = '<iframe src="page.html" style="width:{}px;height:1600px;border:0"></iframe>'
    frames = "".join(map(frame.format, WIDTHS))
    (tmp_path / "frame.html").write_text(
        f'<title></title>{SAY}<body style="margin:0;white-space:nowrap;width:1700px">{frames}'
    )
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--window-size=1700,1600"]
    address, shot = f"file://{tmp_path / 'frame.html'}", tmp_path / "shot.png"
    said = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    found = re.search(r"<title>([\d ;]+)</title>", said)
    assert found, said[:300]
    measured = [tuple(map(int, each.split())) for each in found[1].split(";") if each]
    assert sorted(client for _, client, *_ in measured) == sorted(WIDTHS)
    for scroll, client, broken, count in measured:
        assert scroll <= client and broken == 0 and count >= images
    subprocess.run([*command, f"--screenshot={shot}", address], check=True, timeout=120)
    with Image.open(shot) as picture:
        for left, right in ((0, 1280), (1300, 1660)):
            drawn = picture.convert("RGB").crop((left, 0, right, 1600))
            assert len(drawn.quantize(64).getcolors()) > 30


def test_an_image_that_cannot_be_decoded_is_left_out_of_the_pictures(page, tmp_path):
    """Features, labels and thumbnails keep to the same images."""
    _, run = page
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("features"))
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(config["config"]["data"], tmp_path / "source")
    config["config"]["data"] = str(tmp_path / "source")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    first = min((tmp_path / "source" / "test" / "b & c").iterdir())
    first.write_bytes(b"not an image")
    whole, part = report.classify(run), report.classify(tmp_path / "run")
    assert len(part.test) == len(part.queries) == len(part.truth) == len(whole.test) - 1
    left = [i for i in range(24) if i != whole.truth.tolist().index(1)]
    assert torch.equal(part.truth, whole.truth[left])
    torch.testing.assert_close(part.queries, whole.queries[left])
    for i, j in enumerate(left):
        pictures = report.thumbnail(part.test, i), report.thumbnail(whole.test, j)
        assert pictures[0].tobytes() == pictures[1].tobytes()
