"""An encoder as one file that runs without our code: ONNX, or torch.export's .pt2.

    images      (B, C, H, W), float32 from 0 to 1
    features    (B, F), float32

The normalisation is inside the graph. The crop and the resize are not: they depend on the size of
each photograph, and no two runtimes resize alike. The file's metadata says how the encoder was
judged, in the words of `encoder.safetensors`: `input` has the size, the central share that is
cropped, the interpolation, the mean and the deviation.

B is free, and so are H and W, unless the network takes images of one size alone, as many
transformers do, or chooses its path by the size. A graph is a record of one path, so nothing but a
trial shows which: each file is run at several sizes before it gets its name.
"""

import contextlib
import copy
import io
import itertools
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbols

from common.augment import normalize
from common.cli import require
from common.errors import UserError, first_line
from common.files import atomic_write, to_json, utf8_name
from eval.encoder import Encoder

Run = Callable[[Tensor], Tensor]  # (B, C, H, W) images to (B, F) features

TOLERANCE = 1e-5  # of the largest feature
ONNX_BYTES = 2**31  # the most that a protobuf holds


@dataclass(frozen=True)
class Written:
    """What running the file has shown."""

    difference: float  # from the network's features: max|a - b| / max|b|
    any_size: bool  # whether H and W are free; if not, they are the encoder's
    float32: float  # the network's own difference from float64, measured where the first is > 1e-5


@dataclass(frozen=True)
class Times:
    """Medians of 20 runs on one image of the encoder's size, in milliseconds."""

    network: float  # in torch
    file: float  # in the file's own runtime
    threads: int  # of each of them


def to_onnx(encoder: Encoder, path: Path) -> Written:
    """Write the encoder, a network on the CPU in evaluation mode, as an ONNX file.

    Raises:
        UserError: a package is missing, the file cannot be written, the network is too large for
            the format or has no such graph, or the file gives other features.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    size = sum(t.numel() * t.element_size() for t in encoder.network.state_dict().values())
    if size > 0.99 * ONNX_BYTES:  # the graph itself is small
        raise UserError(
            f"{path}: an ONNX file holds 2 GB, and the network has {size / 1e9:.1f}; .pt2 holds it"
        )

    def content(program: ExportedProgram, any_size: bool) -> bytes:
        axes = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
        graph: Any = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=(axes,),
            dynamo=True,
            verbose=False,
        )
        graph.model.metadata_props.update({k: to_json(v) for k, v in about(encoder).items()})
        return graph.model_proto.SerializeToString()

    return write(encoder, path, content, open_onnx)


def to_pt2(encoder: Encoder, path: Path) -> Written:
    """Write the encoder as a file for `torch.export.load(path).module()`.

    The metadata is JSON: `torch.export.load(path, extra_files=extra)` puts it in the place of
    `extra = {"metadata.json": ""}`. Under torch 2.11, which tells even sizes from odd ones in a
    max-pooling, the file of a ResNet takes the encoder's size alone.

    Raises:
        UserError: as `to_onnx`.
    """

    def content(program: ExportedProgram, any_size: bool) -> memoryview:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"metadata.json": to_json(about(encoder))})
        return buffer.getbuffer()

    return write(encoder, path, content, open_pt2)


def open_onnx(path: Path) -> Run:
    """An ONNX file in onnxruntime, on as many threads of the CPU as torch has."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised as well
    session = onnxruntime.InferenceSession(
        utf8_name(path), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_pt2(path: Path) -> Run:
    """A .pt2 file in torch."""
    with open(path, "rb") as file:  # by its name, torch takes none but *.pt2
        return torch.export.load(file).module()


@torch.no_grad()
def milliseconds(encoder: Encoder, path: Path) -> Times:
    """The time of one image in the network and in a file of `to_onnx` or `to_pt2`."""
    images = torch.rand(1, channels(encoder), encoder.input.size, encoder.input.size)
    with quiet():
        file = (open_onnx if path.suffix == ".onnx" else open_pt2)(path)
    return Times(median(Graph(encoder), images), median(file, images), torch.get_num_threads())


def median(run: Run, images: Tensor) -> float:
    """Milliseconds of a run, the median of 20 after three that warm up."""
    seconds = []
    for _ in range(23):
        start = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[3:])


class Graph(nn.Module):
    """What is written: the normalisation, then the network."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.network
        self.mean, self.std = encoder.input.mean, encoder.input.std

    def forward(self, images: Tensor) -> Tensor:
        if self.mean and self.std:
            images = normalize(images, self.mean, self.std)
        return self.network(images)


def channels(encoder: Encoder) -> int:
    return encoder.metadata.get("channels", 3)


def about(encoder: Encoder) -> dict[str, Any]:
    """The metadata of the encoder and what tells it from others of the same file."""
    chosen = {"input": asdict(encoder.input), "weights": encoder.name, "layer": encoder.layer}
    return encoder.metadata | chosen


def write(
    encoder: Encoder,
    path: Path,
    content: Callable[[ExportedProgram, bool], bytes | memoryview],
    opened: Callable[[Path], Run],
) -> Written:
    """Write the first graph of `attempts` whose file gives the network's features.

    Raises:
        UserError: none does; what was at `path` before stays.
    """
    size = encoder.input.size
    own = trials(encoder, [(1, size, size), (2, size, size), (5, size, size)])
    others = other_sizes(encoder)
    reason = ""
    with atomic_write(path) as aside, torch.no_grad(), quiet():
        for any_size, oblivious in attempts(bool(others)):
            try:
                aside.write_bytes(content(capture(encoder, any_size, oblivious), any_size))
                checked = own + (others if any_size else [])
                difference, float32 = largest_difference(opened(aside), encoder, checked)
                return Written(difference, any_size, float32)
            except (OSError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = first_line(error)
        raise UserError(f"{path}: the network cannot be written as a graph ({reason})")


def attempts(any_size: bool) -> Iterator[tuple[bool, bool]]:
    """Arguments for `capture`: sizes that are free come before those that are not."""
    return itertools.product((True, False) if any_size else (False,), (True, False))


def capture(encoder: Encoder, any_size: bool, oblivious: bool) -> ExportedProgram:
    """The graph of the encoder by torch.export.

    Args:
        oblivious: whether to pass over what torch assumes of dimensions of 1, as torch.onnx does.
            Otherwise a ResNet's graph refuses images for which the last map is of one position;
            but in some networks with another memory format, as ConvNeXt, one image is refused.
    """
    images = torch.rand(2, channels(encoder), encoder.input.size, encoder.input.size)
    free = {axis: Dim.DYNAMIC for axis in ((0, 2, 3) if any_size else (0,))}
    with symbols.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
        program = torch.export.export(Graph(encoder), (images,), dynamic_shapes=(free,))
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


Trials = list[tuple[Tensor, Tensor]]  # images, and the network's features of them


@torch.no_grad()
def trials(encoder: Encoder, shapes: Sequence[tuple[int, int, int]]) -> Trials:
    """Random images of each (B, H, W), and the features that evaluations compute of them.

    Raises:
        UserError: they are infinite or NaN.
    """
    generator = torch.Generator().manual_seed(0)
    run, result = Graph(encoder), []
    for count, *sides in shapes:
        images = torch.rand(count, channels(encoder), *sides, generator=generator)
        features = run(images)
        if not features.isfinite().all():
            raise UserError("the network gives features that are not finite")
        result.append((images, features))
    return result


def other_sizes(encoder: Encoder) -> Trials:
    """Trials at odd, wide, large and small sizes; none if the network does not take them all.

    A network that gives vectors of another length at another size, as pixels do, does not.
    """
    size = encoder.input.size
    shapes = [(2, size + 1, size + 1), (1, 2 * size, size + 32), (5, size - size // 8, size + 3)]
    try:
        result = trials(encoder, [(1, size, size), *shapes])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return []
    return result if len({features.shape[1:] for _, features in result}) == 1 else []


def largest_difference(run: Run, encoder: Encoder, trials: Trials) -> tuple[float, float]:
    """`difference` and `float32` of `Written`.

    Over TOLERANCE, `run` may be no more than twice as far from the network in float64 as the
    network in float32 is: some, as a deep one with GN + WS at initial weights, amplify rounding.

    Raises:
        ValueError: the features are of another shape, or differ by more.
    """
    largest, rounding = 0.0, 0.0
    for images, expected in trials:
        found = run(images)
        if found.shape != expected.shape:
            raise ValueError(f"features {tuple(found.shape)}, not {tuple(expected.shape)}")
        difference = relative(found, expected)
        if not difference <= TOLERANCE:  # nor where one is NaN
            exact = copy.deepcopy(Graph(encoder)).double()(images.double())
            rounding = max(rounding, relative(expected, exact))
            if not relative(found, exact) <= 2 * relative(expected, exact):
                sides = " x ".join(map(str, images.shape[2:]))
                raise ValueError(f"features of {sides} images differ by {difference:.1e}")
        largest = max(largest, difference)
    return largest, rounding


def relative(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print, warn and log: what matters is in the features."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
