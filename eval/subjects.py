"""What a command is to judge: encoders, each with the images, the processes and the settings."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common import cli
from common.config import SOURCE_FLAGS, SourceConfig, read_as, source_config
from common.data import ImageSplit
from common.errors import UserError
from common.files import read_json
from common.launch import launch
from common.plan import Plan, differences, listing, plan_of
from eval.encoder import Encoder, Preprocess, load_encoder
from eval.features import MEMORY_GB, cached, digest_of, encode
from eval.processes import place
from eval.settings import Tested
from eval.splits import hold_out_fifth, open_labelled, open_validation
from eval.training import Crops, Order


@dataclass
class Subject:
    """An encoder with the images that it is judged on, and the folder for its results, if any.

    Args:
        how: the images are read.
        config: the run's settings; empty without a run.
        accelerator: the processes that share the work.
        cache: the folder of cached features.
        check_content: whether images are told apart by all of their bytes.
        multilabel: whether an image may have several labels.
        test_split: to judge on; see eval/splits.py.
        of_run: whether the images are those of the run, perhaps at another place.
        clip: whether stored values beyond `how.value_range` are cut off, or undecodable.
    """

    encoder: Encoder
    source: str
    how: SourceConfig
    folder: Path | None
    config: dict[str, Any]
    accelerator: Accelerator
    precision: str = "fp32"
    workers: int = 2
    cache: Path | None = None
    check_content: bool = False
    multilabel: bool = False
    test_split: str = ""
    of_run: bool = False
    clip: bool = True
    opened: dict[str, Any] = field(default_factory=dict, repr=False)  # splits, by name

    def __post_init__(self) -> None:
        self.network = self.encoder.network.to(self.device)
        if self.precision == "fp64":
            self.network.double()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """Of views and features."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def plan(self) -> Plan:
        """Of the source."""
        if "plan" not in self.opened:
            self.opened["plan"] = plan_of(self.source, self.how, clip=self.clip)
        return self.opened["plan"]

    @property
    def columns(self) -> dict[str, Any]:
        """How the images are read, and which judge, as far as it was said."""
        known = read_as(self.how) | ({"test_split": self.test_split} if self.test_split else {})
        if known.get("value_range") == self.encoder.metadata.get("value_range"):
            known.pop("value_range", None)  # the encoder's own
        return known

    def labelled(self) -> tuple[ImageSplit, ImageSplit | None]:
        """The labelled training split of the source and its test split, if it has one."""
        if "labelled" not in self.opened:
            train, test = open_labelled(
                self.plan, test_split=self.test_split, multilabel=self.multilabel
            )
            self.opened["labelled"] = train, test
            self.tell(train, test)
        return self.opened["labelled"]

    def tell(self, *splits: ImageSplit | None) -> None:
        """Print what is left out and guessed in what has been opened."""
        parts = [images.part for images in splits if images and images.part]
        for line in self.plan.lines(*parts) if self.accelerator.is_main_process else ():
            print(line, file=sys.stderr)

    def tell_bad(self) -> None:
        """Name and count the undecodable images of what has been opened, once; by all processes."""
        told = self.opened.setdefault("told", set())
        for name in ("labelled", "splits", "validation"):
            found = self.opened.get(name)
            for images in found if isinstance(found, tuple) else (found,):
                for bad in gather_object([images.bad]) if images is not None else ():
                    images.bad.update(bad)  # each process met its share
                if images is not None and images.bad and self.accelerator.is_main_process:
                    line = f"{images.name}: {images.report_bad()}"
                    if line not in told:
                        print(line, file=sys.stderr)
                    told.add(line)

    def splits(self) -> tuple[ImageSplit, ImageSplit]:
        """The same; without a test split, a fifth of the training images is held out as one."""
        if "splits" not in self.opened:
            train, test = self.labelled()
            self.opened["splits"] = hold_out_fifth(train) if test is None else (train, test)
        return self.opened["splits"]

    def validation(self) -> ImageSplit | None:
        """The source's own validation split; see eval/splits.py."""
        if "validation" not in self.opened:
            found = self.opened["validation"] = open_validation(self.plan, *self.splits())
            if found and found.part and self.accelerator.is_main_process:
                for note in self.plan.labels(found.part).notes:
                    print(f"  {found.part.name}: {note}", file=sys.stderr)
        return self.opened["validation"]

    def digest(self, images: ImageSplit, preprocess: Preprocess | None = None) -> str:
        """A key of the encoder and the images, wherever these are and whenever they were copied."""
        preprocess = preprocess or self.encoder.input
        return digest_of(self.network, preprocess, images, content=self.check_content)

    def encode(
        self,
        network: nn.Module,
        images: ImageSplit,
        index: Tensor | None = None,
        preprocess: Preprocess | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(N, F) outputs of a network and the (N,) indices of their images; see `encode`."""
        return encode(
            network,
            images,
            preprocess or self.encoder.input,
            self.device,
            index=index,
            precision=self.precision,
            dtype=self.dtype,
            workers=self.workers,
            accelerator=self.accelerator,
        )

    def crops(self, images: ImageSplit, order: Order, name: str) -> Crops:
        """Random crops of labelled images for this process; see `Crops`."""
        images.into_memory(MEMORY_GB)
        return Crops(
            images,
            order,
            self.encoder.input,
            name,
            place(self.accelerator),
            self.device,
            self.dtype,
            self.workers,
        )

    def features(
        self, images: ImageSplit, preprocess: Preprocess | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, F) features and the (N,) indices of their images: those that can be decoded."""
        how = {"times": True, "content": self.check_content}
        given = preprocess or self.encoder.input
        key = digest_of(self.network, given, images, **how) + f"-{self.precision}"
        features, index = cached(
            self.cache,
            key if self.cache else "",
            lambda: self.encode(self.network, images, preprocess=preprocess),
            self.accelerator,
        )
        left_out = len(images) - len(index)
        if left_out and not images.bad and self.accelerator.is_main_process:
            print(f"{images.name}: {left_out} undecodable, as before", file=sys.stderr)
        return features, index

    def extract(
        self, images: ImageSplit, preprocess: Preprocess | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, F) features and (N,) labels; `preprocess` replaces the encoder's own."""
        assert images.labels is not None
        features, index = self.features(images, preprocess)
        return features, images.labels[index]


def subjects(
    settings: Any, *, source: str | None = None, layer: int | None = None, multilabel: bool = False
) -> Iterator[Subject]:
    """The run of an evaluation's settings (or `weights` instead of it), then the baselines.

    What the settings leave open on how to read the images is as in the run if they are the run's.

    Args:
        source, layer: in place of the settings' own.

    Raises:
        UserError: there is no run and no weights, or no data for weights without a run.
    """
    s, run = settings, settings.run
    # a folder may also hold an encoder alone, such as one of the papers' authors
    folder = Path(run) if run and Path(run).is_dir() else None
    has_config = folder is not None and (folder / "config.json").exists()
    if folder and not has_config and not (folder / "encoder.safetensors").exists():
        folder = None  # a checkpoint of TensorFlow, which stays as it was fetched
    config = config_of(folder) if folder and has_config else {}
    tell = cli.is_first() and (source is None or source == s.data[0])  # once for several sources
    given, recorded = s.data if source is None else source, config.get("data", "")
    source = given or recorded
    layer = s.layer if layer is None else layer
    encoders = [load_encoder(run, s.weights, layer)]
    for line in encoders[0].notes if tell else ():
        print(line, file=sys.stderr)
    encoders += [load_encoder(run, name) for name in getattr(s, "baselines", ())]
    if not source:
        raise UserError("say on which images to judge: --data SOURCE")
    if folder is None and tell and isinstance(s, Tested):
        print(
            "results are printed alone, and a stopped judgement starts over: there is no folder of "
            "a run to keep them in (python -m eval.weights makes one of a checkpoint)",
            file=sys.stderr,
        )
    of_run = folder is not None and has_config and is_of_run(source, folder, config)
    told = {name: value for name in SOURCE_FLAGS if (value := getattr(s, name)) not in (None, "")}
    # a range of values belongs to the encoder, as a mean does, whatever the images
    own = {"value_range": known} if (known := encoders[0].metadata.get("value_range")) else {}
    how = source_config((config if of_run else {}) | own | told)
    clip = "value_range" in told or encoders[0].metadata.get("clip", True)
    accelerator = launch("fp32")  # bfloat16 is asked for where a network is called
    opened: dict[str, Any] = {}  # all share the decoded images
    for encoder in encoders:
        yield Subject(
            encoder,
            source,
            how,
            folder / "results" if folder else None,
            config,
            accelerator,
            precision=s.precision,
            workers=s.workers,
            cache=folder / "features" if folder else None,
            check_content=s.check_content,
            multilabel=multilabel,
            test_split=getattr(s, "test_split", ""),
            of_run=of_run,
            clip=clip,
            opened=opened,
        )


def is_of_run(source: str, run: Path, config: dict[str, Any]) -> bool:
    """Whether a source holds the images of a run: it is at the same place, or has the same files.

    Raises:
        UserError: it is the run's own, a local one, and is no longer there.
    """
    files = run / "images.jsonl.gz"
    local = files.exists() and cli.is_local(config["data"])
    there = cli.is_there(cli.split_source(source)[0])
    if cli.absolute(source) == cli.absolute(config["data"]):
        if local and not there:
            raise UserError(f"{source}: the run's images are not there any more; say where: --data")
        return True
    if not (local and there):
        return False
    try:
        plan = plan_of(source, source_config(config))
        found = listing(plan, plan.choose(plan.how.split))
    except UserError:  # it cannot be read in the run's way
        return False
    return bool(found) and not differences(files, found)


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: there is no such file, or it is not one that a run writes.
    """
    path = run / "config.json"
    record = read_json(path)
    config = record.get("config") if isinstance(record, dict) else None
    if isinstance(config, dict):
        texts = [config.get(key) for key in ("data", "image_column", "label_column")]
        if all(isinstance(text, str | None) for text in texts):
            return config
    raise UserError(f"{path}: not of a run")
