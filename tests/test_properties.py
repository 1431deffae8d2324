"""What holds for every input: command lines, sources, damaged images, orders, the queue, views."""

import contextlib
import dataclasses
import io
import math
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

import byol.augment
import byol.config
import byol.optim
import byol.pretrain
import moco.augment
import moco.config
import moco.optim
import moco.pretrain
import simclr.augment
import simclr.config
import simclr.optim
from common import augment, cli
from common.augment import Batched
from common.config import RunConfig
from common.data import ImageSplit, batch_indices, epoch_order, open_images
from common.errors import UserError
from common.views import ViewPairs
from moco.model import MoCo

METHODS = {"simclr": simclr, "moco": moco, "byol": byol}


def examples(count):
    """The same examples every time, so that a failure is one for everybody."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ---- command lines -------------------------------------------------------------------------------

ODD = [
    "", "-", "--", "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "1_0", "0x1", "None",
    "True", "demo", "linear", "[1]", "\x1b[2J", "\udc80", "'", "9" * 30,
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(ODD), st.text(max_size=6), st.integers().map(str))


def flags(method):
    kinds = (METHODS[method].config.Config, RunConfig)
    names = [field.name.replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)]
    odd = ["batchsize", "no-symmetric", "test-size", "cache-chunk", ""]
    flag = st.one_of(st.sampled_from(names), st.sampled_from(odd))
    pair = st.tuples(flag.map(lambda name: f"--{name}"), st.lists(WORDS, max_size=4))
    return st.lists(pair, max_size=3).map(lambda pairs: [x for f, v in pairs for x in (f, *v)])


@pytest.mark.parametrize("method", METHODS)
@examples(60)
@given(data=st.data())
def test_any_command_line_is_a_config_or_one_message_and_status_2(method, data):
    argv = data.draw(st.one_of(flags(method), flags(method).map(lambda f: ["demo", *f]),
                               st.lists(WORDS, max_size=3)))  # fmt: skip
    assume(not {"-h", "--help"} & set(argv))
    config, found, said = METHODS[method].config, None, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            found = cli.run(cli.parse, method, config.Config, config.RECIPES, argv)
        except SystemExit as stopped:
            assert stopped.code == 2
    assert bool(found) != bool(said.getvalue())
    assert said.getvalue().startswith("error: ") == (said.getvalue().count("\n") == 1)
    if found:
        assert isinstance(found[1], config.Config) and isinstance(found[2], RunConfig)


def numbers(kind):
    if kind is int:
        return st.one_of(st.integers(-3, 40), st.sampled_from([10**6, 10**12, -(10**12)]))
    odd = [math.nan, math.inf, -math.inf, 5e-324, 1e-9, 1e300, -0.0]
    return st.one_of(st.floats(-1, 3), st.sampled_from(odd))


def value_of(example):
    if isinstance(example, tuple):
        return st.tuples(*(numbers(type(x)) for x in example))
    return numbers(type(example))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@examples(150)
@given(data=st.data())
def test_numbers_that_are_accepted_can_be_used(method, data):
    """Views, number of steps and learning rates of a config that was not refused."""
    demo, _ = method.config.RECIPES["demo"]
    numeric = [f.name for f in dataclasses.fields(demo)
               if isinstance(getattr(demo, f.name), int | float | tuple)
               and not isinstance(getattr(demo, f.name), bool)]  # fmt: skip
    names = data.draw(st.lists(st.sampled_from(numeric), min_size=1, max_size=4, unique=True))
    try:
        cfg = replace(demo, **{name: data.draw(value_of(getattr(demo, name))) for name in names})
        cfg.check_world_size(1)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith("--")
        return
    count = data.draw(st.integers(cfg.batch_size, 300)) if cfg.batch_size <= 300 else 300
    assume(cfg.batch_size <= count)  # or it is refused by Run
    steps = method.optim.total_steps(cfg, count)
    assert steps >= 0  # 0 is refused by Run
    for step in {0, 1, steps // 2, steps - 1} & set(range(steps)):
        assert math.isfinite(method.optim.lr_at(step, cfg, count))
    for program in map(Batched, method.augment.views(cfg)):
        if cfg.image_size <= 40:
            images = torch.full((2, 3, 3, 2), 7, dtype=torch.uint8)
            shown = program(images, torch.rand(2, program.draws))
            assert shown.shape == (2, 3, cfg.image_size, cfg.image_size)


# ---- sources and images --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory):
    """An empty working directory."""
    folder = tmp_path_factory.mktemp("somewhere")
    with contextlib.chdir(folder):
        yield folder


SOURCES = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="ab/.~-_\\: *?\0\n", max_size=12),
    st.from_regex(r"\A[\w-]{1,6}/[\w.-]{1,6}\Z"),
    st.sampled_from(["~", "~nobody-of-that-name/x", "a" * 300, "a/" * 3000, "\udc80", "hf://a/b"]),
)


@examples(150)
@given(source=SOURCES, split=st.one_of(st.sampled_from(["train", "test"]), st.text(max_size=5)))
def test_any_source_that_is_none_is_one_message(somewhere, source, split):
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        assume(not Path(source).expanduser().exists())
    with pytest.raises(UserError):
        open_images(source, split)


@examples(40)
@given(names=st.sets(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40)))
def test_files_of_any_name_are_found(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    files = set()
    for name in names:
        with contextlib.suppress(UnicodeEncodeError):
            (folder / f"{name}.PnG").write_bytes(PICTURES["PNG"])
            files.add(f"{name}.PnG")
    seen = {name for name in files if not name.startswith(".")}
    if not seen:
        with pytest.raises(UserError, match="no images in it"):
            open_images(str(folder))
        return
    images = open_images(str(folder))
    assert {Path(path).name for path in images.encoded} == seen
    assert "undecodable" not in images.load(1.0)


def picture(kind):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", PICTURES)
@examples(60)
@given(data=st.data())
def test_a_damaged_image_is_an_image_or_a_bad_one(kind, data):
    content = bytearray(PICTURES[kind])
    place = st.integers(0, len(content) - 1)
    front = st.integers(0, min(64, len(content)) - 1)  # where the sizes are
    for i in data.draw(st.lists(st.one_of(place, front), max_size=4)):
        content[i] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.one_of(st.just(len(content)), place))])
    images = ImageSplit("damaged", [{"bytes": content, "path": None}] * 2)
    found = images.try_decode(0)
    if found is None:
        assert images.bad[0].isprintable()
    else:
        assert found.dtype == torch.uint8 and found.shape[0] == 3 and max(found.shape) <= 640


# ---- order ---------------------------------------------------------------------------------------


@examples(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 60),
    share=st.integers(1, 6),
    processes=st.integers(1, 4),
    drop_last=st.booleans(),
    first=st.integers(0, 500),
)
def test_every_epoch_is_a_permutation_shared_by_the_processes(
    seed, count, share, processes, drop_last, first
):
    size = share * processes
    assume(size <= count or not drop_last)
    images = ImageSplit("x", [torch.zeros(3, 1, 1, dtype=torch.uint8)] * count)
    flip = v2.RandomHorizontalFlip()
    ranks = [
        ViewPairs(images, (flip, flip), batch_size=size, seed=seed, rank=rank, processes=processes,
              drop_last=drop_last)
        for rank in range(processes)
    ]  # fmt: skip

    def batch(step):
        return torch.cat([pairs.indices(step) for pairs in ranks])

    per_epoch = count // size * size if drop_last else count
    epoch = first * size // per_epoch
    begin, end = epoch * per_epoch, (epoch + 1) * per_epoch
    steps = range(begin // size, -(-end // size))
    stream = torch.cat([batch(step) for step in steps])[begin - steps[0] * size :][:per_epoch]
    assert torch.equal(stream, epoch_order(seed, epoch, count)[:per_epoch])
    assert stream.unique().numel() == per_epoch and stream.max() < count
    assert sorted(epoch_order(seed, epoch, count).tolist()) == list(range(count))
    # any step can be the first: nothing is kept from the steps before
    kept = batch(first)
    epoch_order.cache_clear()
    assert torch.equal(batch(first), kept)
    alone = batch_indices(first, batch_size=size, count=count, seed=seed, drop_last=drop_last)
    assert torch.equal(kept, alone)


# ---- MoCo's queue --------------------------------------------------------------------------------


@examples(80)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8))
def test_the_queue_is_a_deque_of_its_length(size, batches):
    ring = nn.Module()
    ring.register_buffer("queue", -torch.arange(1.0, size + 1).repeat(2, 1))
    ring.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    ring.register_buffer("queue_fill", torch.zeros(1, dtype=torch.long))
    model, total = deque(ring.queue[0].tolist(), maxlen=size), 0
    for count in batches:
        keys = torch.arange(total, total + count, dtype=torch.float32)
        MoCo.dequeue_and_enqueue(ring, keys[:, None].expand(count, 2))
        model.extend(keys.tolist())
        total += count
        oldest_first = ring.queue.roll(-int(ring.queue_ptr), dims=1)
        assert oldest_first.tolist() == [list(model)] * 2
        assert ring.queue_fill == min(total, size) and ring.queue_ptr == total % size


# ---- views ---------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31)
SIDES = st.integers(1, 33)


def drawn(seed, count, height, width, dtype=torch.float64):
    """(count, 3, height, width) noise with black, white, gray and saturated pixels in it."""
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, height, width, generator=stream, dtype=dtype)
    kinds = torch.randint(0, 6, (count, 1, height, width), generator=stream)
    images = torch.where(kinds == 0, images.round(), images)
    images = torch.where(kinds == 1, images[:, :1], images)
    return torch.where(kinds == 2, images.mul(4).round() / 4, images)


def worst(ours, theirs):
    theirs = torch.stack(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return (ours - theirs).abs().max().item()


COLOUR = {  # torchvision's, range of the factor, tolerance in float64 and in float32
    "brightness": (F.adjust_brightness, 0, 3, 1e-12, 3e-6),
    "contrast": (F.adjust_contrast, 0, 3, 1e-12, 3e-6),
    "saturation": (F.adjust_saturation, 0, 3, 1e-12, 3e-6),
    "hue": (F.adjust_hue, -0.5, 0.5, 3e-6, 3e-6),  # torchvision's is float32 inside
}


@pytest.mark.parametrize("name", COLOUR)
@examples(50)
@given(seed=SEEDS, height=SIDES, width=SIDES, single=st.booleans(), data=st.data())
def test_colour_operations(name, seed, height, width, single, data):
    theirs, low, high, *tolerances = COLOUR[name]
    ours = getattr(augment, name)
    factors = data.draw(st.lists(st.floats(low, high), min_size=1, max_size=4))
    images = drawn(seed, len(factors), height, width, torch.float32 if single else torch.float64)
    before, given_factors = images.clone(), torch.tensor(factors, dtype=torch.float64)
    result = ours(images, given_factors)
    assert (
        worst(result, [theirs(x, f) for x, f in zip(images, factors, strict=True)])
        < (tolerances[single])
    )
    assert result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    assert torch.equal(images, before) and torch.equal(ours(images, given_factors), result)


@examples(50)
@given(seed=SEEDS, height=SIDES, width=SIDES, threshold=st.floats(0, 1))
def test_fixed_operations(seed, height, width, threshold):
    images = drawn(seed, 2, height, width)
    mean, std = [0.4, 0.5, threshold], [0.2, 0.3, 0.1 + threshold]
    assert (
        worst(augment.solarize(images, threshold), [F.solarize(x, threshold) for x in images]) == 0
    )
    assert worst(augment.grayscale(images), [F.rgb_to_grayscale(x, 3) for x in images]) < 1e-12
    expected = [F.normalize(x, mean, std) for x in images]
    assert worst(augment.normalize(images.clone(), mean, std), expected) < 1e-12


@examples(60)
@given(seed=SEEDS, height=SIDES, width=SIDES, data=st.data())
def test_blur(seed, height, width, data):
    most = min(height, width) - 1
    kernel = [2 * data.draw(st.integers(0, min(most, 12))) + 1 for _ in range(2)]
    sigmas = data.draw(st.lists(st.floats(0.1, 5), min_size=1, max_size=3))
    images = drawn(seed, len(sigmas), height, width)
    ours = augment.gaussian_blur(images, kernel, torch.tensor(sigmas, dtype=torch.float64))
    expected = [F.gaussian_blur(x, kernel, [s, s]) for x, s in zip(images, sigmas, strict=True)]
    assert worst(ours, expected) < 1e-12
    assert ours.min() >= images.min() - 1e-12 and ours.max() <= images.max() + 1e-12


BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


@examples(80)
@given(
    seed=SEEDS, height=SIDES, width=SIDES, size=st.tuples(SIDES, SIDES),
    interpolation=st.sampled_from([BILINEAR, BICUBIC]), data=st.data(),
)  # fmt: skip
def test_resized_crop(seed, height, width, size, interpolation, data):
    def box():
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
        return [top, left, h, w]

    boxes = [box() for _ in range(data.draw(st.integers(1, 3)))]
    flip = torch.tensor([data.draw(st.booleans()) for _ in boxes])
    images = drawn(seed, len(boxes), height, width)
    ours = augment.resized_crop(images, torch.tensor(boxes), size, interpolation, flip)
    expected = [
        F.resized_crop(x, *box, list(size), interpolation, antialias=True)
        for x, box in zip(images, boxes, strict=True)
    ]
    expected = [x.flip(-1) if f else x for x, f in zip(expected, flip.tolist(), strict=True)]
    assert worst(ours, expected) < 1e-11
    if interpolation == BILINEAR:
        assert ours.min() >= images.min() - 1e-12 and ours.max() <= images.max() + 1e-12


@examples(60)
@given(
    seed=SEEDS, height=st.integers(1, 2000), width=st.integers(1, 2000),
    scale=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), fraction=st.floats(0.01, 1),
)  # fmt: skip
def test_boxes_are_inside_the_image(seed, height, width, scale, fraction):
    uniforms = torch.rand(40, 22, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([[height, width]]).expand(40, 2)
    for boxes in (
        augment.random_boxes(uniforms, sizes, scale, (3 / 4, 4 / 3)),
        augment.center_crop_boxes(sizes, fraction),
    ):
        corner, extent = boxes.split(2, dim=1)
        assert (corner >= 0).all() and (extent >= 1).all() and (corner + extent <= sizes).all()


def transforms():
    """One transform of each kind, with parameters of its own."""
    p, strength = st.floats(0, 1), st.floats(0, 1)
    clamp = v2.Lambda(partial(torch.clamp, min=0.0, max=1.0))
    inner = st.one_of(
        st.builds(v2.ColorJitter, strength, strength, strength, st.floats(0, 0.5)),
        st.builds(v2.RandomGrayscale, p),
        st.builds(v2.RandomHorizontalFlip, p),
        st.builds(v2.RandomSolarize, st.floats(0, 1), p=p),
        st.floats(0.1, 3).map(lambda sigma: v2.GaussianBlur(3, (0.1, sigma))),
        st.just(clamp),
    )
    return st.one_of(inner, st.builds(lambda t, p: v2.RandomApply([t], p=p), inner, p))


@examples(80)
@given(
    seed=SEEDS, height=SIDES, width=SIDES, size=st.integers(2, 24), count=st.integers(1, 6),
    after=st.lists(transforms(), max_size=5), data=st.data(),
)  # fmt: skip
def test_any_composition(seed, height, width, size, count, after, data):
    """In [0, 1], the same again, each image alone, and never written to what it was given."""
    crop, clamp = v2.RandomResizedCrop(size), v2.Lambda(partial(torch.clamp, min=0.0, max=1.0))
    program = Batched(v2.Compose([crop, clamp, *after]), torch.float64)
    images = drawn(seed, count, height, width)
    stream = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, program.draws, generator=stream, dtype=torch.float64)
    kept = images.clone(), uniforms.clone()
    shown = program(images, uniforms)
    assert shown.shape == (count, 3, size, size)
    assert shown.min() >= -1e-9 and shown.max() <= 1 + 1e-9
    assert torch.equal(images, kept[0]) and torch.equal(uniforms, kept[1])
    assert torch.equal(program(images, uniforms), shown)
    if any("Solarize" in str(t) for t in after):
        return  # it jumps, so that a rounding decides
    start = data.draw(st.integers(0, count - 1))
    part = program(images[start:], uniforms[start:])
    assert (part - shown[start:]).abs().max() < 1e-9
