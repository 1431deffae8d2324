"""The model card of an exported folder, and its way to the Hub.

The card says only what the run has recorded: how the encoder was trained, every result with its
protocol and interval, and how images must be prepared. Folders of the machine are cut off its
paths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import cli
from common.cli import require
from common.errors import UserError, first_line
from common.files import read_json
from eval.encoder import Encoder
from eval.results.compare import as_markdown, escaped, named
from eval.results.page import public
from eval.results.record import METHODS, Result, measured, plural, results_of
from eval.subjects import config_of

JUDGED = {  # which network is exported and judged, of the two that two of the methods have
    "simclr": "The network is the encoder f, without the projection head g (arXiv 2002.05709).",
    "moco": "The network is the query encoder without its head, not the key encoder, its moving "
    "average (arXiv 1911.05722).",
    "byol": "The network is the encoder of the online network, without projector and predictor, "
    "not that of the target network, its moving average (arXiv 2006.07733).",
}
SNIPPETS = {
    "timm": """\
import timm
import torch
from PIL import Image

model = timm.create_model("{timm}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.jpg").convert("RGB")
with torch.inference_mode():
    features = model(transform(image)[None])  # (1, {width})""",
    "transformers": """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{transformers}").eval()
processor = AutoImageProcessor.from_pretrained("{transformers}")
image = Image.open("image.jpg").convert("RGB")
with torch.inference_mode():
    output = model(**processor(image, return_tensors="pt"))
features = output.pooler_output.flatten(1)  # (1, {width})""",
}


def card(encoder: Encoder, run: Path, layout: str, license: str, name: str = "") -> str:
    """The text of README.md: metadata in YAML, then what was done and measured.

    Args:
        run: the run's folder; of a file alone, what its metadata says is told.
        layout: timm or transformers.
        license: of the weights, an identifier of the Hub.
        name: owner/name on the Hub, if it is known.

    Raises:
        UserError: a record of the run cannot be read.
    """
    require("huggingface_hub")
    from huggingface_hub import ModelCardData

    metadata, config = encoder.metadata, config_of(run) if (run / "config.json").exists() else {}
    known = metadata.get("method") or ""
    method = METHODS.get(known, known)
    source = config.get("data", "")
    on_hub = bool(source) and source != "demo" and not cli.is_local(source)
    about = ModelCardData(
        library_name=layout,
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=["self-supervised-learning", *([known] if known in METHODS else [])],
        datasets=[cli.split_source(source)[0]] if on_hub else None,
    )
    title = f"{method} {metadata['encoder']}".strip()
    where = {
        "timm": f"hf-hub:{name}" if name else "local-dir:path/to/this/folder",
        "transformers": name or "path/to/this/folder",
    }
    width = encoder.network.num_features
    parts = [
        f"---\n{about.to_yaml()}\n---\n",
        f"# {escaped(title)}\n",
        f"Features of images, {width:,} of each"
        f"{f', learned without labels by {escaped(method)}' if method else ''}. "
        f"{JUDGED.get(known, 'The network is exported without a head.')}\n",
        f"## Use\n\n```python\n{SNIPPETS[layout].format(**where, width=width)}\n```\n",
        prepared(encoder) + "\n",
        "## Training\n",
        as_markdown([["setting", "value"], *trained(metadata, config, run)]),
        "## Results\n",
        measurements(run),
        "## Licence\n",
        licence(license, origin(metadata)),
    ]
    return "\n".join(parts)


def prepared(encoder: Encoder) -> str:
    """How images are prepared, in words."""
    given = encoder.input
    share = "" if given.crop == 1 else f"{100 * given.crop:.4g} % of "
    text = (
        f"Images are prepared as for every result below: the central square of {share}the shorter "
        f"side, resized to {given.size} pixels ({given.interpolation}, with antialiasing), with "
        "values from 0 to 1"
    )
    if given.mean is not None and given.std is not None:
        mean, std = (", ".join(f"{x:.6g}" for x in values) for values in (given.mean, given.std))
        text += f", of which the mean ({mean}) is subtracted before they are divided by ({std})"
    else:
        text += ", and no mean subtracted"
    if found := encoder.metadata.get("value_range"):
        text += f". 0 and 1 are the stored values {found[0]:g} and {found[1]:g}"
    return f"{text}."


def trained(metadata: Mapping[str, Any], config: Mapping[str, Any], run: Path) -> list[list[str]]:
    """Names and values of what was recorded on the training."""
    known = read_json(run / "config.json") if config else {}
    launches = known.get("launches") or [{}]
    epochs = metadata.get("epochs")
    planned = config.get("epochs")
    finished = metadata.get("finished", True)
    done = "" if epochs is None else plural(epochs, "epoch")
    if not finished:
        done += f" of {planned:g}, not finished" if planned else ", not finished"
    rows = {
        "method": METHODS.get(metadata.get("method", ""), metadata.get("method")),
        "recipe": metadata.get("recipe"),
        "weights of": origin(metadata),
        "network": metadata["encoder"],
        "images": config.get("data"),
        "number of images": f"{known['images']:,}" if "images" in known else None,
        "length": done,
        "batch (of all processes)": config.get("batch_size"),
        "precision": config.get("precision"),
        "seed": config.get("seed"),
        "started by": launches[-1].get("command"),
        "on": launches[-1].get("device"),
        "commit of ssl-reference": metadata.get("commit"),
        "figure to reproduce": metadata.get("published"),
    }
    return [[name, str(public(value))] for name, value in rows.items() if value not in (None, "")]


def measurements(run: Path) -> str:
    """Every result of a run as a table, or that there is none."""
    if not run.is_dir() or not any((run / "results").glob("*.json")):
        return "Nothing was measured.\n"
    results, older = results_of(run)
    results = [Result(**public(vars(result))) for result in results]
    rows = [
        [
            line.name,
            line.column,
            line.result.data,
            measured(line.result),
            f"{line.result.test_images:,}",
        ]
        for line in named(results)
    ]
    text = as_markdown([["encoder", "protocol", "images", "%, 95 % interval", "judged on"], *rows])
    text += "\nTop-1 where no other metric is named; of the last epoch.\n"
    if older:
        text += f"\n{plural(len(older), 'record')} of an older version left out.\n"
    return text


def origin(metadata: Mapping[str, Any]) -> str:
    """Where weights come from that were not trained here; "" for those that were."""
    known = metadata.get("official")
    if not isinstance(known, Mapping):
        return ""
    facts = [f"{name} {known[name]}" for name in ("epoch", "step", "file") if name in known]
    return f"another's checkpoint: {', '.join([str(known.get('kind', '')), *facts])}"


def licence(license: str, origin: str = "") -> str:
    terms = "the images that it was trained on may have terms of their own"
    if origin:  # the licence of this code gives no right to them
        said = "None was stated here" if license == "unknown" else f"Stated here: {license}"
        return f"{said}. The weights are under the terms of those who published them; {terms}.\n"
    if license == "unknown":
        return (
            "The code that trained it, ssl-reference, has the MIT licence. None was stated for "
            f"the weights, and {terms}.\n"
        )
    return f"The weights: {license}. The code that trained them has the MIT licence; {terms}.\n"


def push(folder: Path, name: str, files: Sequence[str]) -> str:
    """Upload the files of a folder to owner/name, which is made if it is not there; its address.

    Raises:
        UserError: in one line, what the Hub or the network says.
    """
    require("huggingface_hub")
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="ssl-reference")
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Upload the encoder",
        )
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; log in with a token that may write: hf auth login" if status in (401, 403) else ""
        raise UserError(f"--push {name}: {first_line(error)}{hint}") from error
    return f"{address}: {', '.join(files)}"
