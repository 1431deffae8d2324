"""One image file: every mode, depth, alpha, slight damage, and what is refused."""

import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.depth import settle
from common.errors import UserError
from common.formats import FORMATS, MAX_SIDE, SUFFIXES, Reading, look_at, read

pytestmark = pytest.mark.filterwarnings("ignore:Image size", "ignore::UserWarning:PIL")


def noise(seed=0, height=8, width=8, channels=3, top=256, kind=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    values = np.random.default_rng(seed).integers(0, top, shape)
    values.flat[:2] = 0, top - 1
    return values.astype(kind)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image, reading=Reading(), **options):  # noqa: B008
    picture = read(image, reading, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def gray(values):
    return np.repeat(np.asarray(values)[..., None], 3, 2)


def by_sample(images, reading=Reading()):  # noqa: B008
    images = images if isinstance(images, list) else [images]
    reading, lines = settle([look_at(image) for image in images], reading, "the source")
    assert all(line.isprintable() for line in lines)
    return reading, lines


def refused(images, reading=Reading()):  # noqa: B008
    with pytest.raises(UserError) as caught:
        by_sample(images, reading)
    assert str(caught.value).isprintable() and str(caught.value).startswith("the source: ")
    return str(caught.value)


def chunk(name, content):
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png(values, colour_type, *more):
    """16 bits; colour types 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body


def tiff(values, photometric=None, order="<", planes=False, **tags):
    """Uncompressed, of any kind of values. tags: t338=[2] and the like, 16 bits each."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    raw = values.astype(values.dtype.newbyteorder(order))
    body = (np.moveaxis(raw, -1, 0) if planes else raw).tobytes()
    part, parts = (len(body) // channels, channels) if planes else (len(body), 1)
    entries = {
        256: [values.shape[1]], 257: [values.shape[0]], 258: [values.dtype.itemsize * 8] * channels,
        259: [1], 262: [(1 if channels < 3 else 2) if photometric is None else photometric],
        273: [8 + i * part for i in range(parts)], 277: [channels], 278: [values.shape[0]],
        279: [part] * parts, 284: [1 + planes],
        339: [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels,
    } | {int(name[1:]): value for name, value in tags.items()}  # fmt: skip
    directory, behind = struct.pack(f"{order}H", len(entries)), b""
    end = 8 + len(body) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        kind, code = (4, "I") if tag in (256, 257, 273, 278, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(value)}{code}", *value)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", end + len(behind)), behind + packed
        directory += struct.pack(f"{order}HHI", tag, kind, len(value)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return head + body + directory + bytes(4) + behind


FLOATS = np.random.default_rng(5).random((12, 10)).astype(np.float32)

# ---- what is read as ever ------------------------------------------------------------------------


def test_neither_torch_nor_torchvision_is_imported():
    code = "import sys, common.formats; print({'torch', 'torchvision'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_paths_bytes_and_cells(tmp_path):
    raw = encoded(noise(3, 5, 7))
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    for given in (path, str(path), {"bytes": None, "path": str(path)}, {"bytes": raw}, raw):
        assert np.array_equal(pixels(given), noise(3, 5, 7))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.jpg").mkdir()
    for name, line in (("pipe", "not a file"), ("dead", "no such file"), ("folder", "not a file")):
        path = tmp_path / f"{name}.jpg"
        for given in (path, str(path), {"bytes": None, "path": str(path)}):
            with pytest.raises(OSError, match=line):
                read(given)
    for cell in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}):
        with pytest.raises(OSError, match="an empty cell"):
            read(cell)
    with pytest.raises(OSError, match="a text"):
        read({"bytes": "words", "path": str(tmp_path / "a.png")})
    listener, here = socket.socket(socket.AF_UNIX), Path.cwd()
    os.chdir(tmp_path)  # the path of a socket may be no longer than 107 bytes
    listener.bind("socket.jpg")
    os.chdir(here)
    with listener, pytest.raises(OSError, match="not a file"):
        read(tmp_path / "socket.jpg")


@pytest.mark.parametrize(
    "content", [b"", b"this is no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_image_whatever_its_suffix(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=r"^cannot identify image file$"):
        read(tmp_path / "a.png")


def test_an_eps_is_refused_though_pillow_opens_it(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(), "EPS"))
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(OSError, match="cannot identify"):
        read(tmp_path / "a.png")


def test_formats_and_their_suffixes():
    of = Image.registered_extensions()
    assert {of[suffix] for suffix in SUFFIXES} <= set(FORMATS)
    assert not {"EPS", "WMF", "PDF", "FITS", "HDF5", "GRIB", "BUFR", "IPTC", "MPEG"} & set(FORMATS)
    assert {".jpg", ".jfif", ".apng", ".avif", ".jp2", ".pgm", ".tga", ".qoi"} <= SUFFIXES


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "QOI", "SGI", "PCX"])
def test_kinds_of_files(kind):
    image = encoded(noise(1, 6, 9), kind) if kind != "QOI" else qoi(noise(1, 6, 9))
    assert np.array_equal(pixels(image), noise(1, 6, 9))
    assert by_sample(image) == (Reading(), [])


def qoi(rgb):
    """The bytes of a QOI file, which not every Pillow writes: each pixel by itself."""
    height, width, _ = rgb.shape
    head = b"qoif" + struct.pack(">IIBB", width, height, 3, 0)
    return head + b"".join(b"\xfe" + bytes(each) for each in rgb.reshape(-1, 3)) + b"\0" * 7 + b"\1"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000", "MPO"])
def test_kinds_of_files_that_lose_a_little(kind):
    image = encoded(np.full((16, 24, 3), (200, 90, 30), np.uint8), kind, quality=95)
    assert np.abs(pixels(image).astype(int) - (200, 90, 30)).max() <= 4


def test_grayscale_and_palette():
    values = (np.arange(48) * 5).astype(np.uint8).reshape(6, 8)
    assert np.array_equal(pixels(encoded(values)), gray(values))
    bits = Image.fromarray(values > 100)
    assert bits.mode == "1"
    assert np.array_equal(pixels(encoded(bits)), gray((values > 100) * 255))
    colours = Image.fromarray(noise(1, 3, 4)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(encoded(colours)), np.array(colours.convert("RGB")))


def test_cmyk():
    shown = pixels(encoded(Image.new("CMYK", (8, 8), (40, 135, 215, 0)), "JPEG", quality=100))
    assert np.abs(shown.astype(int) - (215, 120, 40)).max() <= 3


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(moving), np.broadcast_to([255, 0, 0], (4, 6, 3)))
    still = encoded(frames[0], "GIF")
    assert by_sample([moving, still, still])[1] == [
        "the first of several frames or pages is read in 1 of 3 images looked at"
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # bright at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = pixels(encoded(np.ascontiguousarray(stored), kind, exif=exif, quality=95))
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).max() <= (0 if kind in ("PNG", "TIFF") else 9)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_longer_side_is_reduced(kind):
    wide = encoded(np.full((300, 3 * MAX_SIDE, 3), 77, dtype=np.uint8), kind)
    assert pixels(wide).shape == (100, MAX_SIDE, 3)
    assert np.abs(pixels(wide).astype(int) - 77).max() <= 1
    assert pixels(wide, max_side=64).shape == (10, 64, 3)
    exact = noise(0, MAX_SIDE, 20)
    assert np.array_equal(pixels(encoded(exact)), exact)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700 * 700)
    large = Image.new("RGB", (950, 950), "red")
    assert read(encoded(large, "JPEG"), max_side=400).size == (400, 400)  # reduced as it is decoded
    with pytest.raises(OSError, match="902,500 pixels; reduce it first"):
        read(encoded(large), max_side=400)
    with pytest.raises(Image.DecompressionBombError):
        read(encoded(Image.new("RGB", (1000, 1000)), "JPEG"), max_side=400)  # twice the limit


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_gray_are_divided_by_257(kind):
    deep = np.arange(65536).astype(np.uint16).reshape(256, 256)
    image = encoded(deep, kind)
    assert np.array_equal(pixels(image), gray(deep // 257))
    assert by_sample(image) == (Reading(), [])


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_of_colour_keep_their_high_byte(channels):
    deep = noise(2, 6, 5, channels, 65536, np.uint16)
    if channels != 3:
        deep[..., -1] = 65535
    image = png(deep, {2: 4, 3: 2, 4: 6}[channels])
    shown = deep[..., :3] if channels > 2 else deep[..., :1]
    assert np.array_equal(pixels(image), np.broadcast_to(shown >> 8, (6, 5, 3)))
    assert by_sample(image) == (Reading(), [])


# ---- depths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
def test_floats_from_0_to_1(order):
    image = tiff(FLOATS, order=order)
    reading, lines = by_sample([image] * 3)
    assert (
        reading == Reading()
        and len(lines) == 1
        and "3 images looked at: read as 0 to 1" in lines[0]
    )
    assert np.array_equal(
        pixels({"bytes": image, "path": None}, reading), gray(np.rint(FLOATS * 255))
    )


def test_floats_from_0_to_255():
    image = tiff(FLOATS * 255)
    reading, lines = by_sample(image)
    assert reading == Reading(value_range=(0, 255), clip=False)
    assert "read as 0 to 255; --value-range 0 1 otherwise" in lines[0]
    assert np.array_equal(pixels(image, reading), gray(np.rint(FLOATS * 255)))
    with pytest.raises(OSError, match=r"beyond 0 to 1; --value-range"):
        read(image)


@pytest.mark.parametrize(
    ("values", "seen", "example"),
    [
        (FLOATS - 0.5, "32-bit float values from -0.", "-0.5 0.5"),
        (FLOATS * 4000, "32-bit float values from", "0 4000"),
        (FLOATS * 1.02, "32-bit float values from", "0 1.1"),  # a little beyond 1 is not up to 255
        (noise(1, channels=1, top=4096).astype(np.int16) - 1024, "16-bit signed values", "-1024 "),
        (noise(1, channels=1, top=4096, kind=np.int32) - 1024, "32-bit signed values", "-1024 "),
        (noise(1, channels=1).astype(np.int16) - 128, "from -128 to 127", "-128 127"),
        ((noise(1, channels=1).astype(np.int16) - 128).astype(np.int8), "8-bit signed", "-128 127"),
        (noise(1, channels=1, top=2**20, kind=np.uint32), "32-bit values", "0 1048575"),
    ],
)
def test_what_is_not_decided_is_refused_with_the_flag(values, seen, example):
    image = tiff(values)
    line = refused([image, image])
    assert seen in line and "2 images looked at (mode " in line
    assert "--value-range LOW HIGH" in line and f"e.g. --value-range {example}" in line
    reading = Reading(value_range=(float(values.min()), float(values.max())))
    settled, [line] = by_sample([image], reading)
    assert settled == reading and "looked at: read as" in line
    assert len(np.unique(pixels(image, reading))) > 30


def test_signed_values_in_a_given_range():
    values = np.array([[-2000, -1024, -1023], [0, 3071, 5000]], np.int16)
    given = Reading(value_range=(-1024, 3071))
    assert pixels(tiff(values), given)[..., 0].tolist() == [[0, 0, 0], [63, 255, 255]]
    reading, lines = by_sample(tiff(values), given)
    assert reading == given
    assert "from -2,000 to 5,000" in lines[0] and "--value-range -1024 3071 are cut off" in lines[0]
    small = np.array([[-128, 0, 127]], np.int8)
    shown = pixels(tiff(small), Reading(value_range=(-128, 127)))
    assert shown[..., 0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_bits_in_use_are_those_of_the_largest_value(kind, bits):
    values = noise(bits, 9, 9, 1, 2**bits, kind)
    dark = tiff(values // 4)
    reading, lines = by_sample([dark, tiff(values), dark])
    assert reading == Reading(value_range=(0, 2**bits - 1), clip=False)
    assert len(lines) == 1
    assert f"up to {2**bits - 1:,} in 3 images looked at: read as {bits} bits; --value" in lines[0]
    expected = gray(values.astype(int) * 255 // (2**bits - 1))
    assert np.array_equal(pixels(tiff(values), reading), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda v: png(v, 2),
        lambda v: png(np.dstack([v, np.full_like(v[..., :1], 65535)]), 6),
        lambda v: tiff(v),
        lambda v: tiff(v, order=">"),
        lambda v: tiff(v, planes=True),
        lambda v: tiff(v, planes=True, order=">"),
        lambda v: tiff(np.dstack([v, v[..., :1]]), t338=[0]),
        lambda v: tiff(np.dstack([v, v[..., :1]]), t338=[0], planes=True),
        lambda v: tiff(np.dstack([v, np.full_like(v[..., :1], 65535)]), t338=[1]),
        lambda v: tiff(np.dstack([v, np.full_like(v[..., :1], 65535)]), t338=[2], planes=True),
        lambda v: b"P6 9 7\n65535\n" + v.astype(">u2").tobytes(),
        lambda v: b"P3 # words\n9 7 65535\n" + " ".join(map(str, v.flat)).encode(),
    ],
)
def test_twelve_bits_of_colour_in_sixteen_are_read_in_full(make):
    values = noise(3, 7, 9, 3, 4096, np.uint16)
    image = make(values)
    reading, lines = by_sample(image)
    assert reading.value_range == (0, 4095) and "read as 12 bits" in lines[0]
    assert np.array_equal(pixels(image, reading), values.astype(int) * 255 // 4095)


def test_twelve_bits_of_gray_and_alpha():
    values = noise(3, 7, 9, 1, 4096, np.uint16)
    image = png(np.dstack([values, np.full_like(values, 65535)]), 4)
    reading, _ = by_sample(image)
    assert np.array_equal(pixels(image, reading), gray(values.astype(int) * 255 // 4095))


def test_sixteen_bits_of_colour_of_which_pillow_reads_the_high_bytes():
    dark, bright = noise(1, 9, 9, 3, 16), noise(1, 9, 9, 3, 256)
    assert by_sample(encoded(bright, "SGI", bpc=2)) == (Reading(), [])
    assert np.array_equal(pixels(encoded(bright, "SGI", bpc=2)), bright)
    assert "Pillow reads the high bits alone" in refused(encoded(dark, "SGI", bpc=2))
    assert "high bits" in refused(encoded(bright, "SGI", bpc=2), Reading(value_range=(0, 4095)))
    with pytest.raises(OSError, match="high bits"):
        read(encoded(np.zeros((4, 4, 3), np.uint8), "SGI", bpc=2))


def test_what_a_file_declares():
    values = noise(4, 8, 8, 1, 1000, np.uint16)
    declared = b"P5 8 8 4095\n" + values.astype(">u2").tobytes()
    assert by_sample(declared) == (Reading(), [])
    assert np.array_equal(pixels(declared), gray(values.astype(int) * 255 // 4095))
    half = Reading(value_range=(0, 499))
    expected = np.minimum(values, 499).astype(int) * 255 // 499
    assert np.array_equal(pixels(declared, half), gray(expected))
    hinted = tiff(values, t281=[4095])  # MaxSampleValue
    assert by_sample(hinted)[0].value_range == (0, 4095)
    assert by_sample(tiff(values, t281=[65535]))[0].value_range == (0, 1023)
    assert by_sample(png(values, 0, chunk(b"sBIT", b"\x0c")))[0].value_range == (0, 4095)
    packed = np.packbits((values[..., None] >> np.arange(11, -1, -1)) & 1)  # BitsPerSample 12
    image = tiff(packed.reshape(8, 12), t256=[8], t258=[12])
    assert by_sample(image) == (Reading(), [])
    assert np.array_equal(pixels(image), gray(values.astype(int) * 255 // 4095))


def test_signed_jpeg2000():
    values = noise(4, 16, 16, 1, 4000, np.int32)
    image = encoded(values.astype(np.uint16), "JPEG2000", signed=True)
    look = look_at(image)  # Pillow shows 32768 to 36767
    assert (look.kind.sign, look.low, look.high) == ("signed", 0, 3999)
    reading, lines = by_sample(image)
    assert reading.value_range == (0, 4095) and "16-bit signed values" in lines[0]
    assert np.array_equal(pixels(image, reading), gray(values * 255 // 4095))


@pytest.mark.parametrize("value", [0, 7, 4000])
def test_a_constant_sample_decides_nothing(value):
    for values in (np.full((4, 4), value, np.uint16), np.full((4, 4, 3), value, np.uint16)):
        assert by_sample([tiff(values)] * 3) == (Reading(), [])
        assert len(np.unique(pixels(tiff(values)))) == 1
    assert by_sample(tiff(np.zeros((4, 4), np.float32)))[0] == Reading()
    assert by_sample([]) == (Reading(), [])


def test_eight_bits_beside_sixteen():
    plain, deep = encoded(noise(1)), noise(2, 8, 8, 1, 65536, np.uint16)
    assert by_sample([plain, encoded(deep), plain]) == (Reading(), [])
    reading, _ = by_sample([plain, encoded(deep >> 4), plain])
    assert reading.value_range == (0, 4095)
    assert np.array_equal(pixels(plain, reading), noise(1))
    assert np.array_equal(pixels(encoded(deep >> 4), reading), gray((deep >> 4) * 255.0 // 4095))


@pytest.mark.parametrize(
    "others",
    [
        [encoded(noise(1))],
        [tiff(noise(1, channels=1, top=65536, kind=np.uint16))],
        [tiff(FLOATS * 255), encoded(noise(1, channels=1))],
    ],
)
def test_floats_beside_other_kinds_are_refused(others):
    line = refused([tiff(FLOATS), *others])
    assert "32-bit float values" in line and "--value-range LOW HIGH" in line
    _, [line] = by_sample([tiff(FLOATS), *others], Reading(value_range=(-9, 99999)))
    assert line.endswith("looked at: read as -9 to 99,999")


def test_kinds_that_need_two_ranges_are_refused():
    images = [
        tiff(noise(1, channels=1, kind=np.int32)),
        encoded(noise(1, 8, 8, 1, 65536, np.uint16)),
    ]
    line = refused(images)
    assert (
        "32-bit signed values up to 255 in 1 image" in line and "16-bit values up to 65,5" in line
    )


def test_one_bright_image_among_dark_ones_is_said():
    dark, bright = (tiff(noise(1, 8, 8, 1, top, np.uint16)) for top in (4096, 65536))
    reading, lines = by_sample([dark, dark, bright])
    assert reading == Reading()
    assert "12 bits hold most of the images" in lines[0] and "--value-range 0 4095" in lines[0]


def test_what_lies_beyond_the_range_of_the_sample_is_not_cut_off():
    seen = Reading(value_range=(0, 4095), clip=False)
    bright = tiff(np.array([[1, 4096]], np.uint16))
    with pytest.raises(OSError, match=r"values from 1 to 4,096, beyond 0 to 4,095; --value-range"):
        read(bright, seen)
    assert pixels(bright, Reading(value_range=(0, 4095)))[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers(value):
    values = FLOATS.copy()
    values[3, 3] = value
    for reading in (Reading(), Reading(value_range=(0, 1))):
        with pytest.raises(OSError, match="32-bit float values that are no finite numbers"):
            read(tiff(values), reading)
    with pytest.raises(OSError, match="no finite numbers"):
        look_at(tiff(values))


@pytest.mark.parametrize(
    "values",
    [
        noise(1, 4, 4, 1, 200, np.uint16),
        noise(1, 4, 4, 3, 200, np.uint16),
        noise(1, 4, 4, 1, 2**20, np.int32),
        FLOATS / 1000,
    ],
)
def test_several_values_never_become_one(values):
    image = png(values, 2) if values.ndim == 3 else tiff(values)
    with pytest.raises(OSError, match=r"are one where .* become 0 to 255; --value-range LOW HIGH"):
        read(image)
    with pytest.raises(OSError, match="--value-range LOW HIGH"):
        read(image, Reading(value_range=(-9e9, -8e9)))
    for constant in (0, 100):
        same = np.full_like(values, constant / 300)
        assert len(np.unique(pixels(png(same, 2) if values.ndim == 3 else tiff(same)))) == 1


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_white_is_zero_at_any_depth(kind):
    values = (FLOATS * 65535).astype(kind) if kind == np.uint16 else FLOATS
    straight, inverted = (pixels(tiff(values, photometric)) for photometric in (1, 0))
    assert np.array_equal(inverted, 255 - straight)
    eight = noise(1, channels=1)
    assert np.array_equal(pixels(tiff(eight, 0)), gray(255 - eight))


def test_unsigned_values_beyond_31_bits():
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    assert look_at(tiff(values)).high == 2**32 - 1 and by_sample(tiff(values)) == (Reading(), [])
    assert pixels(tiff(values))[..., 0].tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("values", [FLOATS.astype(np.float64), np.dstack([FLOATS] * 3)])
def test_a_tiff_that_pillow_does_not_read_is_called_so(values):
    with pytest.raises(OSError, match="cannot identify image file: a TIFF of values that Pillow"):
        read(tiff(values))


@pytest.mark.parametrize("values", [(5, 5), (5, 4), (0, float("nan")), (0, float("inf"))])
def test_a_range_that_is_none(values):
    with pytest.raises(UserError, match=r"--value-range .* LOW must be below HIGH"):
        Reading(value_range=values)


# ---- alpha ---------------------------------------------------------------------------------------


def test_transparency_is_over_white():
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 102]]], np.uint8)
    assert pixels(encoded(rgba))[0].tolist() == [[200, 0, 0], [255, 255, 255], [233, 153, 153]]
    assert np.array_equal(pixels(encoded(rgba), Reading(alpha="drop")), rgba[..., :3])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = encoded(palette, transparency=1)
    assert pixels(image)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert pixels(image, Reading(alpha="drop"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    both = encoded(Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA"))
    assert pixels(both)[0].tolist() == [[50] * 3, [255] * 3]
    assert pixels(both, Reading(alpha="drop"))[0].tolist() == [[50] * 3, [50] * 3]


def test_a_transparent_value_of_sixteen_bits():
    values = np.array([[257 * 9, 257 * 9 + 1]])
    image = png(values, 0, chunk(b"tRNS", struct.pack(">H", 257 * 9 + 1)))
    assert pixels(image)[0].tolist() == [[9] * 3, [255] * 3]
    assert pixels(image, Reading(alpha="drop"))[0].tolist() == [[9] * 3] * 2
    absent = png(values, 0, chunk(b"tRNS", struct.pack(">H", 65535)))
    assert pixels(absent)[0].tolist() == [[9] * 3] * 2
    colour = np.array([[[300, 600, 900], [300, 600, 901]]])
    image = png(colour, 2, chunk(b"tRNS", struct.pack(">HHH", 300, 600, 901)))
    assert pixels(image)[0].tolist() == [[1, 2, 3], [255] * 3]


def bitmap(rgba):
    """A BMP of 32 bits with an alpha mask."""
    body = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    height, width = rgba.shape[:2]
    head = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return (
        b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body
    )


@pytest.mark.parametrize("kind", ["BMP", "PNG", "TGA", "TIFF", "16 bits"])
def test_an_alpha_that_hides_everything_is_none(kind):
    rgba = noise(1, channels=4)
    rgba[..., 3] = 0
    image = bitmap(rgba) if kind == "BMP" else b""
    image = png(rgba * np.uint16(257), 6) if kind == "16 bits" else image
    image = image or encoded(rgba, kind)
    assert np.array_equal(pixels(image), rgba[..., :3])
    assert by_sample([image, encoded(noise())])[1] == [
        "an alpha that hides all is taken for none in 1 of 2 images looked at"
    ]


def test_a_palette_that_hides_everything_is_opaque():
    palette = Image.fromarray(noise(1)).quantize(8)
    image = encoded(palette, transparency=bytes(8))
    assert np.array_equal(pixels(image), np.array(palette.convert("RGB")))
    assert "hides all" in by_sample(image)[1][0]


def test_what_would_be_white_on_white_is_an_error():
    rgba = np.full((4, 4, 4), 255, np.uint8)
    assert np.array_equal(pixels(encoded(rgba)), rgba[..., :3])
    rgba[:2, :, 3] = 0
    with pytest.raises(OSError, match="one colour over white; --alpha drop"):
        read(encoded(rgba))


@pytest.mark.parametrize("make", [encoded, bitmap, tiff, lambda v: png(v * np.uint16(257), 6)])
def test_a_last_channel_that_may_be_no_alpha_is_refused_until_a_flag_says(make):
    image = make(noise(1, channels=4))  # a TIFF without ExtraSamples, too
    line = refused([image, image, encoded(noise())])
    assert "most pixels of 2 of 3 images" in line
    assert "--alpha white" in line and "--alpha drop" in line
    for alpha in ("white", "drop"):
        given = Reading(alpha=alpha)
        assert by_sample([image] * 2, given) == (given, [])
    assert np.array_equal(pixels(image, Reading(alpha="drop")), noise(1, channels=4)[..., :3])
    assert pixels(image, Reading(alpha="white")).mean() > 160
    opaque = noise(1, channels=4)
    opaque[..., 3] = 255
    assert by_sample([image, make(opaque), make(opaque)])[0] == Reading()  # not most of them


def test_a_mask_of_zeros_and_ones_is_no_plain_alpha():
    rgba = noise(1, channels=4)
    rgba[..., 3] = rgba[..., 3] < 50
    assert "--alpha" in refused(encoded(rgba))


@pytest.mark.parametrize("depth", [8, 16])
def test_the_tag_of_a_tiff_says_what_its_last_channel_is(depth):
    rgba = noise(1, channels=4)
    rgba[0, 0, 3] = 255
    rgba[..., :3] = np.minimum(rgba[..., :3], rgba[..., 3:])  # as if multiplied by alpha
    stored = rgba if depth == 8 else rgba * np.uint16(257)
    unspecified, multiplied, straight = (tiff(stored, t338=[kind]) for kind in (0, 1, 2))
    assert by_sample(unspecified)[1] == [
        "channels that a tag calls no alpha are left out in 1 of 1 image looked at"
    ]
    assert np.array_equal(pixels(unspecified), rgba[..., :3])
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    for image, expected in (
        (multiplied, colour + 255 * (1 - alpha)),
        (straight, colour * alpha + 255 * (1 - alpha)),
    ):
        assert by_sample(image)[1] == []
        assert np.abs(pixels(image) - expected).max() <= 2
    assert np.array_equal(pixels(straight, Reading(alpha="drop")), rgba[..., :3])


def test_gray_that_is_multiplied_by_its_alpha():
    both = noise(1, channels=4)[..., 2:]
    both[0, 0, 1] = 255
    both[..., 0] = np.minimum(both[..., 0], both[..., 1])
    image = tiff(np.ascontiguousarray(both), t338=[1])
    if int(Image.__version__.split(".")[0]) < 13:  # which has no such mode of a TIFF
        with pytest.raises(OSError, match="a TIFF of values that Pillow does not read"):
            read(image)
    else:
        expected = both[..., :1] + 255 * (1 - both[..., 1:] / 255)
        assert np.abs(pixels(image) - expected).max() <= 2


# ---- slight damage -------------------------------------------------------------------------------

SMOOTH = np.cumsum(np.random.default_rng(0).integers(-3, 4, (48, 64, 3)), 1) + 128
SMOOTH = SMOOTH.clip(0, 255).astype(np.uint8)
LARGE = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize(
    "damaged",
    [
        chunk(b"iCCP", b"p\0\0" + LARGE),
        chunk(b"zTXt", b"words\0\0" + LARGE),
        chunk(b"iTXt", b"words\0\1\0\0\0" + LARGE),
        b"".join(chunk(b"zTXt", b"w\0\0" + zlib.compress(bytes(10**6))) for _ in range(70)),
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\1\0\0")[:-1] + b"\0",
        chunk(b"tEXt", b"key\0value")[:-1] + b"\0",
        chunk(b"pHYs", b"a"),
        chunk(b"gAMA", b""),
    ],
)
def test_a_png_of_broken_or_large_metadata_is_its_pixels(tmp_path, damaged):
    whole = encoded(noise(1, 20, 20))
    for image in (whole[:33] + damaged + whole[33:], whole[:-12] + damaged + whole[-12:]):
        (tmp_path / "a.png").write_bytes(image)
        for given in (image, tmp_path / "a.png"):
            assert np.array_equal(pixels(given), noise(1, 20, 20))
        assert by_sample(image) == (Reading(), [])
    cut = whole[:33] + damaged + whole[33:-300]
    with pytest.raises(OSError, match="truncated"):
        read(cut)


def test_a_mended_png_keeps_its_transparency_and_its_turn():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(noise(1, 4, 6, 1)), transparency=0, exif=exif)
    mended = whole[:33] + chunk(b"iTXt", b"words\0\1\0\0\0" + LARGE) + whole[33:]
    assert pixels(mended).shape == (6, 4, 3)
    assert np.array_equal(pixels(mended), pixels(whole))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_broken_exif_leaves_an_image_as_it_is(kind):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    image = encoded(SMOOTH, kind, exif=exif)
    expected = pixels(image)
    starts = [start for start in (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08") if start in image]
    assert len(starts) == 1
    for broken in (b"ruined!!", starts[0][:4] + b"\xff" * 4, starts[0][:4] + bytes(4)):
        assert np.array_equal(pixels(image.replace(starts[0], broken)), expected)


JPEGS = [
    {},
    {"progressive": True},
    {"subsampling": 0, "quality": 95},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 1},
]


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_may_lack_its_last_two_bytes_and_no_more(tmp_path, options, mode):
    whole = encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", **options)
    expected = pixels(whole)
    for cut in (1, 2):
        (tmp_path / "a.jpg").write_bytes(whole[:-cut])
        assert np.array_equal(pixels(tmp_path / "a.jpg"), expected)
        assert np.array_equal(pixels({"bytes": whole[:-cut]}), expected)
    for cut in [*range(3, 30), 100, len(whole) // 3]:
        try:
            shown = pixels(whole[:-cut])
        except OSError as error:
            assert "truncated" in str(error)
        else:  # bits that stand for nothing
            assert cut < 5 and np.array_equal(shown, expected)
    assert look_at(whole[:-2]).width == 64


def test_a_progressive_jpeg_without_its_last_scan_is_truncated():
    whole = encoded(SMOOTH, "JPEG", progressive=True)
    scan = whole.rindex(b"\xff\xda")
    table = whole.rindex(b"\xff\xc4", 0, scan)
    for cut in (scan, table):
        with pytest.raises(OSError, match="truncated"):
            read(whole[:cut])


def test_a_large_jpeg_that_lacks_its_end_is_reduced_as_any_other():
    whole = encoded(np.repeat(np.repeat(SMOOTH, 16, 0), 16, 1), "JPEG")
    assert np.array_equal(pixels(whole[:-2], max_side=128), pixels(whole, max_side=128))
    with pytest.raises(OSError, match="truncated"):
        read(whole[: len(whole) // 2], max_side=128)


def test_nothing_of_pillow_is_switched_for_the_whole_process():
    from PIL import ImageFile, PngImagePlugin

    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    whole = encoded(noise())
    read(whole[:33] + chunk(b"zTXt", b"words\0\0" + LARGE) + whole[33:])
    read(encoded(noise(), "JPEG")[:-2])
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
