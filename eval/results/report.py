"""One page about one or more runs: figures, curves, and the images that an encoder finds similar.

`python -m eval.compare` calls `write`. The page is one file: pictures are data URIs, charts are
inline SVG, there is no script, and nothing is fetched. Whatever comes from data is escaped.
"""

import base64
import html
import io
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data import ImageSplit, subset
from common.errors import UserError
from common.files import atomic_write_bytes, read_json, read_rows, utf8_name
from eval.knn import OnlineKNN, accuracy, predict, subsample
from eval.results.compare import as_markdown, escaped
from eval.settings import KNN
from eval.subjects import Subject, subjects

Table = Sequence[Sequence[str]]
SHORT = ' class="short"'
SIDE = 48  # pixels of a thumbnail
ROWS, NEAREST, THUMBNAILS, DOTS = 10, 8, 70, 1000  # the most that is shown of each
CHARTS = {
    "loss": "Loss (dashed: at chance)",
    "knn": "kNN Top-1 during training (%)",
    "contrastive_top1": "Contrastive Top-1 (share)",
    "lr": "Learning rate",
    "feature_std": "Feature deviation (1: spread evenly, 0: one point)",
    "effective_rank": "Effective rank",
    "alignment": "Alignment (0: positives are equal)",
    "uniformity": "Uniformity (0: one point, about -4: even)",
    "pairs_per_second": "Pairs per second",
    "data_wait": "Share of time waiting for data",
}


def e(text: object) -> str:
    return html.escape(str(text), quote=True)


# ---- features and their neighbours ---------------------------------------------------------------


@dataclass
class Classified:
    """Features of a run's images, and the classes that kNN predicts from them."""

    train: ImageSplit
    test: ImageSplit
    bank: Tensor  # (N, F) of train, unit length
    queries: Tensor  # (Q, F) of test, unit length
    labels: Tensor  # (N,)
    truth: Tensor  # (Q,)
    ranking: Tensor  # (Q, C) classes, most likely first


def classify(run: Path) -> Classified:
    """Classify test images as the online kNN does: at most 10,000 training and 2,000 test images.

    Raises:
        UserError: there is no encoder yet, or there are no labelled images.
    """
    subject = next(iter(subjects(KNN(run=str(run)))))
    train, test = subject.splits()
    train, bank, labels = decoded(subject, subsample(train, OnlineKNN.BANK))
    test, queries, truth = decoded(subject, subsample(test, OnlineKNN.QUERIES))
    ranking, _ = predict(
        queries, bank, labels, classes=len(train.classes), k=OnlineKNN.K, temperature=0.1
    )
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    return Classified(train, test, bank, queries, labels, truth, ranking)


def decoded(subject: Subject, images: ImageSplit) -> tuple[ImageSplit, Tensor, Tensor]:
    """Those of `images` that can be decoded, with their features and labels."""
    features, index = subject.features(images)
    if len(index) < len(images):
        images = subset(images, torch.isin(torch.arange(len(images)), index), "decoded")
    assert images.labels is not None
    return images, features, images.labels


def plane(features: Tensor) -> tuple[Tensor, float]:
    """(N, F) to their first two principal components, (N, 2), and their share of the variance."""
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    u, s = F.pad(u, (0, 2))[:, :2], F.pad(s, (0, 2))
    u = u * torch.where(u.gather(0, u.abs().argmax(0)[None]) < 0, -1.0, 1.0)  # fixes the sign
    return u * s[:2], float(s[:2].square().sum() / s.square().sum().clamp_min(1e-30))


def confusions(result: Classified, limit: int = ROWS) -> list[tuple[int, int, int, int]]:
    """(true class, predicted class, count, index of an example), the most frequent first."""
    classes, predicted = len(result.train.classes), result.ranking[:, 0]
    pairs = (result.truth * classes + predicted)[predicted != result.truth]
    pairs, counts = pairs.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:limit]
    rows = []
    for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        true, other = divmod(pair, classes)
        example = ((result.truth == true) & (predicted == other)).nonzero()[0].item()
        rows.append((true, other, count, int(example)))
    return rows


def examples(truth: Tensor, count: int = ROWS) -> list[int]:
    """Indices of test images to show: the first of each class, then the second, and so on."""
    of_class = [(truth == label).nonzero()[:, 0].tolist() for label in truth.unique().tolist()]
    rounds = ([members[i] for members in of_class if i < len(members)] for i in range(count))
    return [index for members in rounds for index in members][:count]


def project(run: Path, result: Classified) -> None:
    """Write RUN/projector for TensorBoard: features, classes and thumbnails of the test images."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(run / "projector", ignore_errors=True)
    index = range(0, len(result.test), max(1, -(-len(result.test) // DOTS)))
    pictures = [torch.tensor(list(thumbnail(result.test, i, square=True).getdata())) for i in index]
    images = torch.stack(pictures).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 255
    names = [" ".join(result.train.classes[result.truth[i]].split()) or "-" for i in index]
    (run / "projector").mkdir()
    with SummaryWriter(utf8_name(run / "projector")) as writer:
        writer.add_embedding(result.queries[list(index)], names, images, tag="representation")


# ---- pictures ------------------------------------------------------------------------------------


def thumbnail(images: ImageSplit, index: int, square: bool = False) -> Image.Image:
    batch = images.batch(torch.tensor([index]))
    height, width = batch.sizes[0].tolist()
    pixels = batch.images[0, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    if square:
        return picture.resize((SIDE, SIDE))
    picture.thumbnail((SIDE, SIDE))
    return picture


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture_uri(images: ImageSplit, index: int) -> str:
    buffer = io.BytesIO()
    thumbnail(images, index).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def picture(images: ImageSplit, index: int, name: str, kind: str = "") -> str:
    source = picture_uri(images, index)
    return f'<img class="thumb {kind}" src="{source}" alt="{e(name)}" title="{e(name)}">'


def hue(label: int, classes: int) -> str:
    return f"hsl({360 * label / max(classes, 1):.0f} 65% 50%)"


# ---- parts of the page ---------------------------------------------------------------------------


def table_html(table: Table) -> str:
    head, *body = table
    cells = "".join(f'<th scope="col">{e(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{e(row[0])}</th>'
        + "".join(f"<td{SHORT if len(cell) < 36 else ''}>{e(cell)}</td>" for cell in row[1:])
        for row in body
    ]
    body_rows = "</tr>".join(lines)
    inner = f"<thead><tr>{cells}</tr></thead><tbody>{body_rows}</tr></tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def series(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) points of everything that a run logged."""
    record = read_json(run / "config.json")
    per_step = record["config"]["batch_size"] / record["images"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(run / "metrics.jsonl") + read_rows(run / "timings.jsonl"):
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, []).append(((row["step"] + 1) * per_step, value))
    return points


def chart(title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """An SVG of lines, each with its CSS class; the axes begin and end at round numbers."""
    points = [point for _, line in lines for point in line]
    xs, ys = zip(*points, strict=True)
    y_ticks, last = ticks(min(ys), max(ys)), max(xs)
    x_ticks = [x for x in ticks(0, last) if x <= last]
    left, right, top, bottom = 46, 348, 12, 168

    def x_at(x: float) -> float:
        return left + (right - left) * x / last

    def y_at(y: float) -> float:
        return bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = []
    for y in y_ticks:
        height = y_at(y)
        ends = f'x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(
            f'<text x="{left - 6}" y="{height + 3.5:.1f}" text-anchor="end">{y:.6g}</text>'
        )
    for x in x_ticks:
        parts.append(f'<text x="{x_at(x):.1f}" y="184" text-anchor="middle">{x:.6g}</text>')
    for kind, line in lines:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        if len(line) == 1:
            x, y = line[0]
            parts.append(f'<circle class="{kind}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2"/>')
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="200" text-anchor="middle">epochs</text>')
    drawing = (
        f'<svg viewBox="0 0 360 206" role="img" aria-label="{e(title)}">{"".join(parts)}</svg>'
    )
    return f"<figure><figcaption>{e(title)}</figcaption>{drawing}</figure>"


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, the first at or below `low` and the last at or above `high`."""
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def curves(runs: Sequence[Path]) -> str:
    """A chart for each metric that the runs logged, with a line for each run."""
    logged = [series(run) for run in runs]
    figures = []
    for key, title in CHARTS.items():
        lines = [(f"c{i % 8}", points[key]) for i, points in enumerate(logged) if key in points]
        if key == "loss":
            chance = [(i, points) for i, points in enumerate(logged) if "chance_loss" in points]
            lines += [(f"c{i % 8} chance", points["chance_loss"]) for i, points in chance]
        if lines:
            figures.append(chart(title, lines))
    legend = "".join(
        f'<span><i class="c{i % 8}"></i>{e(run.name)}</span>' for i, run in enumerate(runs)
    )
    return f'<p class="legend">{legend}</p><div class="charts">{"".join(figures)}</div>'


def map_svg(result: Classified) -> str:
    """Test images on the plane of their first two principal components; thumbnails of some."""
    step = max(1, -(-len(result.queries) // DOTS))
    index = torch.arange(0, len(result.queries), step)
    flat, share = plane(result.queries[index])
    low, high = flat.min(0).values, flat.max(0).values
    spots = ((flat - low) / (high - low).clamp_min(1e-12) * 840 + 30).tolist()
    classes, parts = len(result.train.classes), []
    placed: list[tuple[float, float]] = []
    for i, (x, y) in zip(index.tolist(), spots, strict=True):
        label = int(result.truth[i])
        name, colour = e(result.train.classes[label]), hue(label, classes)
        parts.append(
            f'<circle class="dot" cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{colour}">'
            f"<title>{name}</title></circle>"
        )
    for i, (x, y) in zip(index.tolist(), spots, strict=True):
        if len(placed) < THUMBNAILS and all(math.dist((x, y), other) > 62 for other in placed):
            placed.append((x, y))
            label = int(result.truth[i])
            box = f'x="{x - 22:.0f}" y="{y - 22:.0f}" width="44" height="44"'
            parts.append(f'<image {box} href="{picture_uri(result.test, i)}"/>')
            parts.append(f'<rect class="frame" {box} stroke="{hue(label, classes)}"/>')
    legend = "".join(
        f'<span><i style="background:{hue(label, classes)}"></i>{e(name)}</span>'
        for label, name in enumerate(result.train.classes[:40])
    )
    caption = (
        f"{len(index):,} test images on the first two principal components of their unit-length "
        f"features, which hold {share:.0%} of the variance. The colour is the class."
    )
    return (
        f'<figure class="map"><svg viewBox="0 0 900 900" role="img" aria-label="map of features">'
        f"{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"
        f'<p class="legend">{legend}</p>'
    )


def neighbours(result: Classified) -> str:
    """Rows of pictures: a test image, then the training images nearest to it."""
    names, rows, count = result.train.classes, [], min(NEAREST, len(result.bank))
    for i in examples(result.truth):
        near = (result.queries[i] @ result.bank.T).topk(count).indices.tolist()
        true = int(result.truth[i])
        labels = [int(result.labels[j]) for j in near]
        pictures = "".join(
            picture(result.train, j, names[label], "same" if label == true else "other")
            for j, label in zip(near, labels, strict=True)
        )
        same = sum(label == true for label in labels)
        rows.append(
            f'<div class="near">{picture(result.test, i, names[true])}<span class="arrow">→</span>'
            f"<div>{pictures}</div><small>{e(names[true])}: {same} of {len(labels)}</small></div>"
        )
    return "".join(rows)


def confusion_table(result: Classified) -> list[list[str]]:
    names = result.train.classes
    table = [["true class", "taken for", "how often", "of its images"]]
    for true, other, count, _ in confusions(result):
        share = count / int((result.truth == true).sum())
        table.append([names[true], names[other], f"{count}", f"{share:.0%}"])
    return table


def confusion_html(result: Classified) -> str:
    names, items = result.train.classes, []
    for (true, other, _, example), row in zip(
        confusions(result), confusion_table(result)[1:], strict=True
    ):
        shown = picture(result.test, example, names[true])
        pair = f"<b>{e(names[true])}</b> taken for <b>{e(names[other])}</b>"
        items.append(
            f"<li>{shown}<span>{pair}<br>{row[2]} times, {row[3]} of its images</span></li>"
        )
    return f'<ul class="wrong">{"".join(items)}</ul>' if items else "<p>Nothing went wrong.</p>"


def neighbours_html(run: Path) -> tuple[str, str]:
    """The pictures of one run as HTML, and its confusions as Markdown; it writes RUN/projector."""
    name = e(run.name)
    try:
        result = classify(run)
    except UserError as error:
        return f"<section><h2>{name}: its features</h2><p>{e(error)}</p></section>", ""
    project(run, result)
    top1 = accuracy(result.ranking, result.truth)
    summary = (
        f"By kNN (k {OnlineKNN.K}) from {len(result.bank):,} training images, {top1:.1f} % of "
        f"{len(result.queries):,} test images are classified correctly"
    )
    parts = [
        f"<section><h2>{name}: the map of its features</h2>{map_svg(result)}",
        "<p>The same in TensorBoard's projector: ",
        f"<code>tensorboard --logdir {name}/projector</code></p></section>",
        f"<section><h2>{name}: nearest neighbours</h2><p>A test image, then the training images ",
        "whose features are nearest. Framed green: of the same class.</p>",
        f"{neighbours(result)}</section>",
        f"<section><h2>{name}: what went wrong most</h2><p>{summary}.</p>",
        f"{confusion_html(result)}</section>",
    ]
    lines = [f"## {escaped(run.name)}: what went wrong most\n", f"{summary}.\n"]
    return "".join(parts), "\n".join([*lines, as_markdown(confusion_table(result))])


# ---- the page ------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5c6670;--line:#d9dee3;--paper:#fff;
--card:#f6f7f9;--good:#2e9e5b;--bad:#d0493e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ad;--line:#384049;--paper:#14181c;
--card:#1c2126}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem}
p,small,figcaption{color:var(--soft)}
code{font-size:.85em}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;
min-width:5.5rem;max-width:24rem;overflow-wrap:break-word}
th:first-child,td:first-child{text-align:left}
.short{white-space:nowrap}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600}
img.figure{width:100%;min-width:560px;max-width:820px;background:#fff;border-radius:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:1rem}
figure{margin:0;background:var(--card);border-radius:8px;padding:.7rem;min-width:0}
figcaption{font-size:.85rem;margin:.2rem 0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:10px}
.grid{stroke:var(--line)}
circle{stroke-width:4}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.chance{stroke-dasharray:4 4;opacity:.7}
.c0{stroke:#3b7dd8;background:#3b7dd8}.c1{stroke:#e08a1e;background:#e08a1e}
.c2{stroke:#2e9e5b;background:#2e9e5b}.c3{stroke:#c44e9b;background:#c44e9b}
.c4{stroke:#7a6bd0;background:#7a6bd0}.c5{stroke:#d0493e;background:#d0493e}
.c6{stroke:#1f9aa8;background:#1f9aa8}.c7{stroke:#8a8f45;background:#8a8f45}
.map{max-width:760px}
.dot{fill-opacity:.55;stroke:none}
.frame{fill:none;stroke-width:3}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}
.legend i{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em}
.thumb{width:48px;height:48px;object-fit:contain;border-radius:4px;background:var(--card)}
@media(max-width:600px){.near .thumb{width:36px;height:36px}.near div{gap:5px}}
.same{outline:2px solid var(--good)}.other{outline:2px solid var(--bad)}
.near{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .7rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
.near div{display:flex;flex-wrap:wrap;gap:6px}
.wrong{list-style:none;padding:0;display:grid;gap:.7rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.wrong li{display:flex;gap:.8rem;align-items:center;background:var(--card);border-radius:8px;
padding:.6rem;font-size:.9rem;min-width:0}
.wrong span{min-width:0}
"""


def page(title: str, sections: Iterable[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{e(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{e(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def write(
    folder: Path,
    runs: Sequence[Path],
    groups: Sequence[tuple[str, Sequence[Table], Sequence[str], bytes]],
) -> None:
    """Write folder/index.html and folder/report.md.

    Args:
        groups: for each data set its heading, tables, remarks and the PNG to show after them.
    """
    sections, texts = [], ["# " + escaped(", ".join(run.name for run in runs)) + "\n"]
    for heading, tables, remarks, drawing in groups:
        parts = [*map(table_html, tables), *(f"<p>{e(line)}</p>" for line in remarks)]
        bars = f'<img class="figure" src="{data_uri(drawing)}" alt="Top-1 as bars">'
        parts.append(f'<div class="wide">{bars}</div>')
        sections.append(f"<section><h2>On {e(heading)}</h2>{''.join(parts)}</section>")
        texts += [f"## On {escaped(heading)}\n", *map(as_markdown, tables)]
        texts += [f"{escaped(line)}\n" for line in remarks]
    sections.append(f"<section><h2>Training</h2>{curves(runs)}</section>")
    for run in runs:
        shown, text = neighbours_html(run)
        sections.append(shown)
        texts.append(text)
    title = ", ".join(run.name for run in runs)
    atomic_write_bytes(folder / "index.html", page(title, sections).encode(errors="shown"))
    atomic_write_bytes(folder / "report.md", "\n".join(texts).encode(errors="shown"))
