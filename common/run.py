"""A run: its folder on disk, its progress, and going on where it stopped.

RUN/config.json            all settings, those that were overridden; command, commit, versions
RUN/plan.json              what the source holds, what is read of it, and how
RUN/images.jsonl.gz        the files that it is trained on: names below the source, and bytes
RUN/metrics.jsonl          one line a logged step; the same bits for the same run, resumed or not
RUN/timings.jsonl          pairs/s, share of the time waiting for data, peak memory
RUN/events.out.tfevents.*  both of the above and pictures, for TensorBoard
RUN/checkpoints/           the last two, each written aside and then renamed
RUN/encoder.safetensors    what eval/ reads: the encoder, the head, how to build them
RUN/features/              features that evaluations keep
RUN/results/*.json         one per evaluation
RUN/.lock                  held while a command trains here
"""

import gzip
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from common import config
from common.checkpoints import Checkpoints, check_finite
from common.cli import absolute, split_source
from common.config import RunConfig
from common.data import ImageSplit, seed_noise
from common.errors import UserError
from common.files import (
    append_row,
    atomic_write,
    atomic_write_bytes,
    keep_rows_before,
    naming,
    read_json,
    remove_leftovers,
    to_json,
)
from common.health import collapse_warning, embedding_metrics
from common.launch import StopSignal, bfloat16_advice, commit, provenance
from common.plan import differences, listing, record_of
from common.trackers import Trackers
from common.views import ViewPairs

Views = tuple[Tensor, Tensor]
ON_BAR = {"loss": ".3g", "knn": ".3g", "queue_fill": ".0%", "data_wait": ".0%"}


class Run:
    """The folder of one pretraining run, opened for the first time or again.

    Only the main process writes. A step's metrics, checkpoint and pictures depend on the config
    alone; whatever a clock says goes to `timings.jsonl`.

    Args:
        method, recipe: names for the record, e.g. "simclr", "cifar10".
        defaults: the recipe's own settings; what differs from them is recorded as overridden.
        cfg: the method's settings; it has `arch`, `batch_size` and `advice`.
        images: the N training images.
        total_steps: of the whole run.

    Raises:
        UserError: not one step or batch.
    """

    def __init__(
        self,
        method: str,
        recipe: str,
        defaults: config.Recipe,
        cfg: Any,
        run_cfg: RunConfig,
        accelerator: Accelerator,
        images: ImageSplit,
        total_steps: int,
    ) -> None:
        self.method, self.cfg, self.run_cfg = method, cfg, run_cfg
        self.recipe = recipe
        self.accelerator, self.images, self.total_steps = accelerator, images, total_steps
        self.main = accelerator.is_main_process
        self.dtype = torch.float64 if run_cfg.precision == "fp64" else torch.float32
        self.folder = Path(run_cfg.out)
        self.start_step = 0
        self._metrics: dict[str, float] = {}  # of the step under way
        self._shown: dict[str, str] = {}
        self._warned = False
        if cfg.batch_size > len(images):
            raise UserError(f"--batch-size {cfg.batch_size}: more than the {len(images)} images")
        if total_steps < 1:
            raise UserError(f"--epochs: too few for one step on {len(images):,} images")
        self._overridden = config.overridden(cfg, run_cfg, defaults)
        plan = images.plan.lines(images.part) if images.plan and images.part else []
        hints = cfg.advice()
        if cfg.arch != "demo":  # whose operations are too short to gain
            hints = [*hints, *bfloat16_advice(run_cfg.precision, accelerator.device)]
        for line in (*hints, *plan, images.load(run_cfg.memory_gb)):
            self.print(line)

    def open(
        self,
        state: Mapping[str, Any],
        encoder: nn.Module,
        head: nn.Sequential,
        metadata: Mapping[str, Any],
        measures: Mapping[str, Callable[[], float]],
        collapse_from: int = 0,
        classifier: Any = None,
    ) -> None:
        """Open the folder, and go on from its newest checkpoint, if there is one.

        Args:
            state: what a checkpoint holds: name to module or optimizer, before `prepare`.
            encoder, head, metadata: what is exported; see `eval/encoder.py`.
            measures: what is measured every `knn_every` epochs, by the name that it is logged as.
            collapse_from: the first step at which embeddings that are all alike are a bad sign.
            classifier: trained beside, at the end of each step: see `OnlineLinear` of
                eval/online.py; None: there is none.

        Raises:
            UserError: the folder holds a run on other images, is in use by another command or
                cannot be written.
        """
        self.encoder, self.head, self.metadata = encoder, head, metadata
        self.measures, self.collapse_from = measures, collapse_from
        self.classifier = classifier
        if classifier:
            state = {**state, **classifier.state}
            self.measures = {**measures, **classifier.measures}
        self._record_launch()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", state, self.accelerator)
        self.start_step = self.checkpoints.load()
        for line in self.checkpoints.unreadable:
            self.print(f"{line}; trying the one before")
        if self.main:
            for name in ("metrics.jsonl", "timings.jsonl"):
                keep_rows_before(self.folder / name, self.start_step)
            names = self.run_cfg.trackers if self.start_step < self.total_steps else ()
            settings = config.flat(self.cfg, self.run_cfg)
            self.trackers = Trackers(names, self.folder, self.start_step, settings)
        if self.start_step:
            self.print(f"going on from step {self.start_step:,} of {self.total_steps:,}")

    def _record_launch(self) -> None:
        path = self.folder / "config.json"
        launches, old = [], None
        if path.exists():
            old = read_json(path)
            launches = old.get("launches", [])
        files = self._check_files(old)
        if old and old.get("images") != len(self.images):
            raise UserError(
                f"--out {self.folder}: holds a run on {old.get('images')} images (now "
                f"{len(self.images)}); give another folder"
            )
        if not self.main:
            return
        with naming(self.folder):
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / "results").mkdir(exist_ok=True)
        self._lock = lock(self.folder)  # held while this run lives
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "checkpoints")
        if self.images.plan and self.images.part:
            plan = to_json(self.images.plan.record(self.images.part), indent=1)
            atomic_write_bytes(self.folder / "plan.json", plan.encode() + b"\n")
            images = self.folder / "images.jsonl.gz"
            if not (old and images.exists()):  # else `_check_files` has found it to be the same
                atomic_write_bytes(images, gzip.compress(record_of(files), mtime=0))
        record = {
            "method": self.method,
            "recipe": self.recipe,
            "config": config.flat(self.cfg, self.run_cfg),
            "overridden": self._overridden,
            "images": len(self.images),
            "steps": self.total_steps,
            "launches": [*launches, provenance(self.accelerator.num_processes)],
        }
        atomic_write_bytes(path, to_json(record, indent=2).encode() + b"\n")

    def _check_files(self, old: Mapping[str, Any] | None) -> list[list[Any]]:
        """The names and sizes of the files trained on, which must be those of the run so far.

        Raises:
            UserError: they are others; all processes raise it.
        """
        problem, files = "", []
        plan, part = self.images.plan, self.images.part
        if self.main and plan and part:  # whatever is wrong, the others must hear of it
            files = [list(file) for file in listing(plan, part)]
            record = self.folder / "images.jsonl.gz"
            if old:
                before, now = str(old["config"].get("data")), self.cfg.data
                moved = place_of(before) != place_of(now)
                problem = differences(record, files)
                if moved and not record.exists() and plan.kind != "hub":
                    problem = f"the images at {before}, with no list of them to compare {now} with"
                elif moved and not problem:
                    self.print(f"the images of this run, now at {now} (before: {before})")
        [problem] = broadcast_object_list([problem])
        if problem:
            raise UserError(f"--out {self.folder}: holds a run on {problem}; give another folder")
        return files

    # ---- the loop ----

    def steps(self, pairs: ViewPairs) -> Iterator[tuple[int, Views]]:
        """(step, (view1, view2)) for every step still to do, behind a progress bar.

        After SIGTERM or SIGINT the step is finished, a checkpoint written, and the process exits
        with status 128 plus the signal's number.
        """
        batch_size = self.cfg.batch_size
        if pairs.unbatched:
            names = ", ".join(pairs.unbatched)
            self.print(f"{names}: no batched form, so image by image, which is slower")
        self._bar = tqdm(
            total=self.total_steps * batch_size,
            initial=self.start_step * batch_size,
            unit="pair",
            unit_scale=True,
            dynamic_ncols=True,
            desc=f"{self.method} {self.recipe}",
            disable=not self.main,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        # the signals are caught before decoding workers start, which keep what they find
        with StopSignal(self.accelerator.num_processes) as stop:
            stream = pairs(self.start_step, self.total_steps)
            began, done = time.perf_counter(), 0
            waiting = Waiting(self.accelerator.device)
            for step in range(self.start_step, self.total_steps):
                with waiting:
                    views = next(stream)
                # what a network itself draws, as in dropout, is the same after a restart
                rank, device = self.accelerator.process_index, self.accelerator.device
                seed_noise(device, self.run_cfg.seed, "network", step, rank)
                yield step, views
                done += 1
                self._bar.update(batch_size)
                if self.should_log(step):
                    spent = time.perf_counter() - began
                    self._log_timings(step, done * batch_size / spent, waiting.taken() / spent)
                    began, done = time.perf_counter(), 0
                if (signum := stop.agreed()) and step + 1 < self.total_steps:
                    self._stop(step + 1, signum)
        self._bar.close()

    def end_step(self, step: int, views: Views, embeddings: Views, **metrics: Any) -> None:
        """All that a run does after a step: log, measure, export and save, where that is due.

        Args:
            views: of this process, (B, C, H, W) each; pictured at the first step.
            embeddings: of the two views and of this process, (B, D) each; see health.py.
            metrics: scalars that depend on the config alone. A tensor is averaged over processes.

        Raises:
            UserError: the loss or a weight is not finite, or a file cannot be written.
        """
        if step == self.start_step and self.main:
            self._log_views(step, *views)
        if self.classifier:
            metrics |= self.classifier.step(step)
        if self.should_log(step):
            z1, z2 = self.accelerator.gather(tuple(z.detach().contiguous() for z in embeddings))
            self._log(step, metrics | embedding_metrics(z1, z2))
        if self.measures and self.is_due(step, self.run_cfg.knn_every):
            self._log(step, {name: measure() for name, measure in self.measures.items()})
        if self.is_due(step, self.run_cfg.save_every):
            self._export(step + 1)
            self._write_metrics(step)  # a checkpoint must not be ahead of the metrics
            self.checkpoints.save(step + 1)
        self._write_metrics(step)

    def _stop(self, step: int, signum: int) -> None:
        self.checkpoints.save(step)
        self._bar.close()
        if self.main:
            self.trackers.close()
        name = signal.Signals(signum).name
        self.print(f"stopped by {name} after step {step:,}; the same command goes on from there")
        self.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has
        sys.exit(128 + signum)

    def finish(self) -> None:
        """Close the files and say what can be done next."""
        for bad in gather_object([self.images.bad]):  # each process met its share
            self.images.bad.update(bad)
        if self.images.bad:
            self.print(self.images.report_bad())
        if self.main:
            self.trackers.close()
        self.accelerator.wait_for_everyone()
        following = "knn" if len(self.images.classes) > 1 else "neighbours"
        self.print(f"done: {self.folder}; next: python -m eval.{following} {self.folder}")
        self.accelerator.end_training()

    # ---- what is due when ----

    def should_log(self, step: int) -> bool:
        """Whether `step` is a logged one."""
        return step % self.run_cfg.log_every == 0 or step + 1 == self.total_steps

    def is_due(self, step: int, epochs: float) -> bool:
        """Whether a multiple of `epochs` is complete after `step`; true after the last step."""
        if step + 1 == self.total_steps or epochs <= 0:
            return step + 1 == self.total_steps
        steps = epochs * len(self.images) / self.cfg.batch_size
        return steps <= 1 or step // steps < (step + 1) // steps

    # ---- logging ----

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = self.accelerator.reduce(value.detach(), "mean").item()
            if name == "loss":
                check_finite(step, torch.as_tensor(value))
            self._metrics[name] = value
        if "feature_std" in values and step >= self.collapse_from:
            warning = collapse_warning(self._metrics)
            if warning and not self._warned:
                self.print(warning)
            self._warned = bool(warning)

    def _write_metrics(self, step: int) -> None:
        metrics, self._metrics = self._metrics, {}
        if not metrics or not self.main:
            return
        append_row(self.folder / "metrics.jsonl", {"step": step} | metrics)
        self.trackers.log(step, metrics)
        self._show(metrics)

    def _log_timings(self, step: int, rate: float, wait: float) -> None:
        if not self.main:
            return
        row = {"pairs_per_second": rate, "data_wait": wait, "peak_memory_gb": peak_memory_gb()}
        append_row(self.folder / "timings.jsonl", {"step": step} | row)
        self.trackers.log(step, {f"timing/{name}": value for name, value in row.items()})
        self._show(row)

    def _show(self, values: Mapping[str, float]) -> None:
        self._shown |= {
            name: format(values[name], form) for name, form in ON_BAR.items() if name in values
        }
        self._bar.set_postfix(self._shown, refresh=False)

    def _log_views(self, step: int, view1: Tensor, view2: Tensor, count: int = 8) -> None:
        """A picture of `count` view pairs, one above the other, each stretched to full range."""
        views = torch.cat([view1[:count], view2[:count]]).detach().float().cpu()
        grid = make_grid(views, nrow=min(count, len(view1)), normalize=True, scale_each=True)
        self.trackers.log_image(step, "views", grid)

    def print(self, line: str) -> None:
        """A line above the progress bar."""
        if self.main:
            tqdm.write(line, file=sys.stderr)

    # ---- export ----

    def _export(self, step: int) -> None:
        """Write `encoder.safetensors`: the encoder's tensors, the head's under `head.`, metadata.

        Where the encoder itself has a `head`, the metadata names another prefix.

        Floating-point tensors are written as float32 whatever the run's precision. This precedes
        the checkpoint: a run killed between the two does its last steps again and misses neither.
        """
        check_finite(step, [self.encoder.state_dict(), self.head.state_dict()])
        if not self.main:
            return
        tensors = dict(self.encoder.state_dict())
        prefix = "head."
        while any(key.startswith(prefix) for key in tensors):  # as in timm's ConvNeXt
            prefix = f"projection_{prefix}"
        tensors |= {f"{prefix}{key}": value for key, value in self.head.state_dict().items()}
        tensors = {
            key: (value.float() if value.is_floating_point() else value).cpu().contiguous()
            for key, value in tensors.items()
        }
        known = {
            "method": self.method,
            "recipe": self.recipe,
            "epochs": round(step * self.cfg.batch_size / len(self.images), 3),
            "head": [layer_name(layer) for layer in self.head],
            **({"head_prefix": prefix} if prefix != "head." else {}),
            "finished": step >= self.total_steps,
            "commit": commit(),
        }
        if self.images.reading.value_range:
            known["value_range"] = list(self.images.reading.value_range)
            known["clip"] = self.images.reading.clip
        text = {key: to_json(value) for key, value in (known | dict(self.metadata)).items()}
        with atomic_write(self.folder / "encoder.safetensors") as aside:
            save_file(tensors, aside, metadata=text)


class Waiting:
    """The time for which steps had no views, summed over `with` blocks that fetch them.

    On a CUDA device it is the time for which the device had nothing to do before they came: while
    it computes one step, this process may well prepare the next.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.intervals: list[tuple[Any, Any]] = []  # seconds, or events

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self.began = self.now()

    def __exit__(self, *_: object) -> None:
        self.intervals.append((self.began, self.now()))

    def taken(self) -> float:
        """Seconds, since this was last called; it waits for the device to come to the last."""
        intervals, self.intervals = self.intervals, []
        if not self.cuda:
            return sum(end - began for began, end in intervals)
        if intervals:
            intervals[-1][1].synchronize()
        return sum(began.elapsed_time(end) for began, end in intervals) / 1000


def place_of(source: str) -> tuple[str, str]:
    """Where a SOURCE is, links followed, and its configuration."""
    path, configuration = split_source(absolute(source))
    return os.path.realpath(path), configuration


def layer_name(layer: nn.Module) -> str:
    """The class of a head's layer, the same however many processes its statistics came from."""
    is_batchnorm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return "BatchNorm1d" if is_batchnorm else type(layer).__name__


def lock(folder: Path) -> Any:
    """An open file that keeps a second command out of `folder`, where the system has such locks.

    Raises:
        UserError: another command has it.
    """
    with naming(folder):
        file = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"--out {folder}: another command is training there") from error
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def peak_memory_gb() -> float:
    """The most memory that was in use so far: the GPU's, or this process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**30 if platform.system() == "Darwin" else 2**20  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
