"""A run: its processes, its folder on disk, its progress bar, and going on where it stopped.

RUN/config.json            resolved config; command, commit, versions of each launch
RUN/metrics.jsonl          one line a logged step; the same bits for the same run, resumed or not
RUN/timings.jsonl          pairs/s, share of time waiting for data, peak memory, FLOP/s
RUN/events.out.tfevents.*  both of the above and pictures, for TensorBoard
RUN/checkpoints/           the last two, each written aside and then renamed
RUN/encoder.safetensors    what eval/ reads: torchvision's key names, how to build the network
RUN/results/*.json         one per evaluation
RUN/trace.json.gz          of a few steps, with --profile
RUN/.lock                  held while a command trains here
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from common import speed
from common.cli import UserError
from common.faults import Stop
from common.views import Pairs

DTYPES = {"fp64": torch.float64}  # the other precisions keep float32 views and weights
FREE = frozenset(  # may differ when a run goes on
    {"out", "workers", "memory_gb", "processes", "compile", "profile", "estimate"}
)
ASIDE = (".config.json", ".encoder.safetensors", "checkpoints/.step-*.pt")  # see `written_aside`


def launch(precision: str, processes: int) -> Accelerator:
    """The accelerator of this process.

    On GPUs convolutions of float32 are TF32 (torch's default: 10 bits of mantissa), and the fastest
    of cudnn's; matrix products, and so views, similarities and LARS, are float32.

    Raises:
        UserError: `processes` is not 0 and not the number that were launched
            (`accelerate launch --cpu --num_processes 2` quietly starts one).
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    mixed = precision if precision in ("bf16", "fp16") else "no"
    accelerator = Accelerator(cpu=not accelerated, mixed_precision=mixed)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # all steps have the same shapes
    if processes and processes != accelerator.num_processes:
        raise UserError(
            f"--processes {processes} asked for, {accelerator.num_processes} launched; "
            f"try: accelerate launch --multi_gpu --num_processes {processes} -m ..."
        )
    return accelerator


class Run:
    """The folder of one pretraining run, opened for the first time or again.

    Only the main process writes. A step's lines, checkpoint and pictures depend on the config
    alone; whatever a clock says goes to `timings.jsonl`. With `config.estimate` nobody writes: the
    loop gets a few steps, what the run would take is printed, and that is all.

    Args:
        config: the method's frozen dataclass; it has `out`, `batch_size`, `log_every`, `precision`,
            `estimate` and `profile`.
        method, recipe: names for the record, e.g. "simclr", "cifar10".
        count: N, the number of training images.
        total: steps of the whole run.

    Raises:
        UserError: not one step, or the folder holds a run of another config, is in use by another
            command or cannot be written.
    """

    def __init__(
        self,
        config: Any,
        method: str,
        recipe: str,
        accelerator: Accelerator,
        count: int,
        total: int,
    ) -> None:
        self.config, self.method, self.recipe, self.count = config, method, recipe, count
        self.accelerator, self.total = accelerator, total
        self.main = accelerator.is_main_process and not config.estimate
        self.folder = Path(config.out)
        self.first = 0
        if total < 1:
            raise UserError(f"--epochs: too few for one step on {count:,} images")
        self._parts: Mapping[str, Any] = {}  # of a checkpoint
        self._row: dict[str, Any] = {}  # of the step under way
        self._timings: dict[str, float] = {}
        self._parameters: list[nn.Parameter] = []
        self._flops = 0.0  # per pair, once a step was taken
        self._warned = False
        self._tensorboard: Any = None
        self._bar: Any = None
        self._lock: Any = None
        if not config.estimate:
            self._record_launch()

    # ---- config ----

    def _record_launch(self) -> None:
        path = self.folder / "config.json"
        values = json.loads(json.dumps(dataclasses.asdict(self.config)))
        record: dict[str, Any] = {"method": self.method, "recipe": self.recipe, "config": values}
        record |= {"images": self.count, "steps": self.total, "launches": []}
        if path.exists():
            old = read_json(path)
            try:
                self._refuse_if_other(old, record)
                record["launches"] = [*old["launches"]]
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not of a run; give another --out") from error
        if self.main:
            with written(self.folder):
                self._refuse_a_second()
                (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                (self.folder / "results").mkdir(exist_ok=True)
                for name in ASIDE:  # left by a kill within `written_aside`
                    for left in self.folder.glob(f"{name}.[0-9]*"):
                        left.unlink()
            record["launches"].append(provenance(self.accelerator.num_processes))
            write_atomically(path, json.dumps(record, indent=2).encode() + b"\n")

    def _refuse_a_second(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")  # open, and so held, while this run lives
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"--out {self.folder}: another command is training there") from error
        except OSError:  # a file system without locks
            pass

    def _refuse_if_other(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        a, b = ({"method": r["method"], "images": r["images"]} | r["config"] for r in (old, new))
        differ = [key for key in a | b if key not in FREE and a.get(key) != b.get(key)]
        if differ:
            said = ", ".join(f"{key} {a.get(key)!r} (now {b.get(key)!r})" for key in differ)
            raise UserError(
                f"--out {self.folder}: holds a run made with {said}; "
                "give the same settings to go on with it, or another folder"
            )

    # ---- checkpoints ----

    def resume(self, parts: Mapping[str, Any]) -> None:
        """Load the newest readable checkpoint into `parts`; `first` is then the next step.

        The main process chooses, so that all load the same one.

        Raises:
            UserError: another process cannot read it.
        """
        self._parameters = speed.trained_parameters(*parts.values())
        if self.config.estimate:
            return
        self._parts = self._with_scaler(parts)
        state = self._newest() if self.main else None
        [self.first] = broadcast_object_list([state["step"] if state else 0])
        if self.first and not self.main:
            path = self._checkpoint(self.first)
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path}: machines must share --out to go on ({error})") from error
        if state:
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
        if self.main:
            for name in ("metrics.jsonl", "timings.jsonl"):
                drop_rows_from(self.folder / name, self.first)
        if self.first:
            self.say(f"going on from step {self.first:,} of {self.total:,}")

    def _newest(self) -> dict[str, Any] | None:
        for path in sorted((self.folder / "checkpoints").glob("step-*.pt"), reverse=True):
            try:
                with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                    if file.testzip():
                        raise zipfile.BadZipFile
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torn or damaged: the one before it is kept for this
                self.say(f"{path}: cannot be read ({type(error).__name__}); trying the one before")
        return None

    def _checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}.pt"

    def save(self, step: int, parts: Mapping[str, Any]) -> None:
        """Write the state after `step` steps; keep the last two.

        Raises:
            UserError: a value in it is not finite (on all processes), or the disk is full.
        """
        parts = self._with_scaler(parts)
        state = {name: part.state_dict() for name, part in parts.items()}
        self._refuse_unless_finite(step, state)
        if not self.main:
            return
        self._write_row()  # a checkpoint must not be ahead of the metrics
        with written_aside(self._checkpoint(step)) as aside:
            torch.save({"step": step} | state, aside)
        for old in sorted((self.folder / "checkpoints").glob("step-*.pt"))[:-2]:
            old.unlink()

    def _refuse_unless_finite(self, step: int, values: Any) -> None:
        """No file is written of weights that are lost: the last one that was is kept."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(values)):
            raise UserError(
                f"the loss or a weight is NaN or infinite at step {step:,}; the last checkpoint "
                "is kept. Try a lower --base-lr, a longer warm-up or --precision fp32, in another "
                "--out"
            )

    def _with_scaler(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        scaler = self.accelerator.scaler  # of fp16 only
        return dict(parts) | ({"scaler": scaler} if scaler is not None else {})

    def export(self, step: int, encoder: nn.Module, head: nn.Sequential, **metadata: Any) -> None:
        """Write `encoder.safetensors`: the encoder's tensors, the head's under `head.`, metadata.

        Floating-point tensors are written as float32 whatever the run's precision.

        Raises:
            UserError: as `save`, before which it is called: a run killed between the two does
                its last steps again and misses neither file.
        """
        self._refuse_unless_finite(step, [encoder.state_dict(), head.state_dict()])
        if not self.main:
            return
        tensors = dict(encoder.state_dict())
        tensors |= {f"head.{key}": value for key, value in head.state_dict().items()}
        tensors = {
            key: (value.float() if value.is_floating_point() else value).cpu().contiguous()
            for key, value in tensors.items()
        }
        epochs = step * self.config.batch_size / self.count
        known = {
            "method": self.method,
            "recipe": self.recipe,
            "epochs": round(epochs, 3),
            "head": [kind(layer) for layer in head],
            "finished": step >= self.total,
            "commit": commit(),
        }
        text = {key: json.dumps(value) for key, value in (known | metadata).items()}
        with written_aside(self.folder / "encoder.safetensors") as aside:
            save_file(tensors, aside, metadata=text)

    # ---- the loop ----

    def steps(self, pairs: Pairs) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(step, (view1, view2)) for every step still to do, behind a progress bar.

        After SIGTERM or SIGINT the step is finished, a checkpoint written, and the process exits
        with status 128 plus the signal's number.
        """
        if self.config.estimate:
            trained = sum(p.nbytes for p in self._parameters)
            yield from enumerate(speed.tried(pairs(0, self.total), trained, self._report))
            return
        self._bar = tqdm(
            total=self.total * self.config.batch_size,
            initial=self.first * self.config.batch_size,
            unit="pair",
            unit_scale=True,
            dynamic_ncols=True,
            desc=f"{self.method} {self.recipe}",
            disable=not self.main,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        stop = Stop(self.accelerator.num_processes)
        with stop:  # before decoding workers start, which keep what they find
            stream = self._watched(pairs(self.first, self.total))
            began, waited, done = time.perf_counter(), 0.0, 0
            for step in range(self.first, self.total):
                asked = time.perf_counter()
                views = next(stream)
                waited += time.perf_counter() - asked
                yield step, views
                self._write_row()
                done += 1
                self._bar.update(self.config.batch_size)
                if self.logs(step):
                    spent = time.perf_counter() - began
                    rate = done * self.config.batch_size / spent
                    self._record_timings(step, rate, waited / spent)
                    began, waited, done = time.perf_counter(), 0.0, 0
                if (signum := stop.asked()) and step + 1 < self.total:
                    self._stop(step + 1, signum)
        self._bar.close()
        for bad in gather_object([pairs.images.bad]):  # each process met its share
            pairs.images.bad.update(bad)
        if pairs.images.bad:
            self.say(pairs.images.report_bad())

    def _stop(self, step: int, signum: int) -> None:
        self.save(step, self._parts)
        self._bar.close()
        name = signal.Signals(signum).name
        self.say(f"stopped by {name} after step {step:,}; the same command goes on from there")
        self.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has
        sys.exit(128 + signum)

    def _watched(self, stream: Iterator[speed.Views]) -> Iterator[speed.Views]:
        if self.first == 0:
            # operations may go another way while they are counted: in this step only
            stream = speed.counted(stream, self._know_flops)
        else:
            self._flops = self._counted_before()
        if self.config.profile and self.main:
            stream = speed.profiled(stream, self.folder / "trace.json.gz")
        return stream

    def _know_flops(self, per_pair: float) -> None:
        self._flops = per_pair

    def _counted_before(self) -> float:
        path = self.folder / "timings.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return next((json.loads(r)["flops"] for r in reversed(rows) if '"flops"' in r), 0.0)

    def _report(self, trial: speed.Trial) -> None:
        if self.accelerator.is_main_process:
            text = speed.report(
                trial,
                precision=self.config.precision,
                parameters=sum(p.numel() for p in self._parameters),
                total=self.total,
                processes=self.accelerator.num_processes,
            )
            print(f"{self.method} {self.recipe}, nothing trained or written\n{text}")

    def finish(self) -> None:
        """Close the files and say what can be done next."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        self.accelerator.wait_for_everyone()
        self.say(f"done: {self.folder}; next: python -m eval.knn {self.folder}")
        self.accelerator.end_training()

    def logs(self, step: int) -> bool:
        """Whether `step` is a logged one."""
        if self.config.estimate:
            return False
        return step % self.config.log_every == 0 or step + 1 == self.total

    def due(self, step: int, epochs: float) -> bool:
        """Whether a multiple of `epochs` is complete after `step`; true after the last step."""
        if self.config.estimate:
            return False
        if step + 1 == self.total or epochs <= 0:
            return step + 1 == self.total
        steps = epochs * self.count / self.config.batch_size
        return steps <= 1 or step // steps < (step + 1) // steps

    def log(self, step: int, **values: float | Tensor) -> None:
        """Scalars that depend on the config alone, for the one line of this step.

        A tensor is averaged over the processes: all of them must call.

        Raises:
            UserError: the loss is not finite.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = self.accelerator.reduce(value.detach(), "mean").item()
            if name == "loss":
                self._refuse_unless_finite(step, [torch.as_tensor(value)])
            self._row[name] = value
        self._row["step"] = step

    def _write_row(self) -> None:
        row, self._row = self._row, {}
        if not row or not self.main:
            return
        step = row.pop("step")
        append_row(self.folder / "metrics.jsonl", {"step": step} | row)
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, step)
        shown: dict[str, str] = {
            name: f"{row[name]:.3g}" for name in ("loss", "knn") if name in row
        }
        if row.get("queue_fill", 1.0) < 1:  # MoCo: why the loss still rises
            shown["queue"] = f"{row['queue_fill']:.0%}"
        if self._timings:
            shown["waiting"] = f"{self._timings['data_wait']:.0%}"
            shown["memory"] = f"{self._timings['peak_memory_gb']:.1f}GB"
            if "mfu" in self._timings:
                shown["MFU"] = f"{self._timings['mfu']:.0%}"
            elif "tflops" in self._timings:
                shown["TFLOP/s"] = f"{self._timings['tflops']:.3g}"
        self._bar.set_postfix(shown, refresh=False)

    def _record_timings(self, step: int, rate: float, wait: float) -> None:
        self._timings = {
            "pairs_per_second": rate,
            "data_wait": wait,
            "peak_memory_gb": speed.peak_memory_gb(),
        }
        if self._flops:
            achieved = rate / self.accelerator.num_processes * self._flops
            self._timings["flops"] = self._flops  # of a pair
            self._timings["tflops"] = achieved / 1e12  # a second, of each process
            if most := speed.peak_flops(speed.device_name(), self.config.precision):
                self._timings["mfu"] = achieved / most
        if self.main:
            append_row(self.folder / "timings.jsonl", {"step": step} | self._timings)
            for name, value in self._timings.items():
                self.tensorboard.add_scalar(f"timing/{name}", value, step)

    def log_views(self, step: int, view1: Tensor, view2: Tensor, count: int = 8) -> None:
        """A picture of `count` view pairs, one above the other, each stretched to full range."""
        if not self.main:
            return
        pairs = torch.cat([view1[:count], view2[:count]]).detach().float().cpu()
        grid = make_grid(pairs, nrow=min(count, len(view1)), normalize=True, scale_each=True)
        self.tensorboard.add_image("views", grid, step)

    def warn_once(self, line: str | None) -> None:
        """Say `line`, if there is one, unless the last warning was the same kind."""
        if line and not self._warned:
            self.say(line)
        self._warned = bool(line)

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.main:
            tqdm.write(line, file=sys.stderr)

    @property
    def tensorboard(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._tensorboard = SummaryWriter(str(self.folder), purge_step=self.first)
        return self._tensorboard


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(target: Path) -> Iterator[None]:
    """What fails in here is told as a `target` that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save's is a RuntimeError
        reason = str(error).partition("\n")[0][:200]
        if "inline_container" in reason:  # torch.save's words, which do not name the cause
            reason = "the disk is full, or gone"
        raise UserError(
            f"{target}: cannot be written ({reason}); once it can, give the same command again"
        ) from error


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A path to write to, renamed to `target` once it is whole and on the disk.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with written(target):
            yield aside
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_atomically(target: Path, content: bytes) -> None:
    with written_aside(target) as aside:
        aside.write_bytes(content)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    with written(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def kind(layer: nn.Module) -> str:
    """The class of a head's layer, the same however many processes its statistics came from."""
    normalizes = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return "BatchNorm1d" if normalizes else type(layer).__name__


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of a state dict, at any depth."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)


def drop_rows_from(path: Path, step: int) -> None:
    """Keep the whole lines of steps before `step`: the rest will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a line torn by a kill
            if json.loads(line)["step"] < step and line.endswith(b"\n"):
                kept.append(line)
    write_atomically(path, b"".join(kept))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


# ---- provenance ----------------------------------------------------------------------------------


def provenance(processes: int) -> dict[str, Any]:
    """What a result must name: command, commit, versions, machine, time."""
    import torchvision

    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {main.name}" if main else sys.argv[0]
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores)"
    return {
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": device,
        "processes": processes,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The git commit of this code, `+` where it differs; "unknown" outside a checkout.

    Records are not code: measuring again changes those that are there.
    """
    here = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        if head := git("rev-parse", "--short=12", "HEAD"):
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
            return head + ("+" if changed else "")
    return "unknown"
