"""One image file in, an upright 8-bit RGB picture out: Pillow's decoders, and what they get wrong.

What becomes of an odd image:

    CMYK, palette, gray, 1 bit        RGB
    16 bits                           8 bits, from 0 to 65535 or what `settle` finds to be in use
    10, 12, 14 bits in 16; 8 in 32    8 bits, by the largest value of the source's sample
    float                             8 bits, from 0 to 1, or from 0 to 255 if the sample says so
    other float, negative values      refused until --value-range LOW HIGH says what they are
    a TIFF whose 0 is white           inverted, at any depth
    transparent                       over white; --alpha drop leaves transparency out
    transparent everywhere            as if it were opaque
    a channel that is no alpha        left out where a TIFF tag says so, else refused until
                                      --alpha white or --alpha drop says what it is
    animated, several pages           the first frame
    turned by EXIF                    upright; as it is if the EXIF is broken
    a PNG of broken or huge metadata  its pixels
    a JPEG without its last 2 bytes   whole
    a side longer than max_side       reduced to it; a JPEG while it is decoded
    1 x 1, 1 x 100                    as any other

    truncated, empty, not an image    an error with the reason: the caller names and counts it
    an EPS, whatever its suffix
    a FIFO, a socket, a dead link
    more than 89 megapixels (a JPEG: 179)
    values that are not finite, or lie beyond the range that the sample has
    several values that would all become one

"Deep" are stored values that 8 bits cannot hold, or that are signed: they need a rule, which is one
for all images of a source. `look_at` a sample, `settle` the rule, `read` each image by it.
"""

import contextlib
import functools
import io
import math
import os
import re
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image, UnidentifiedImageError

from common.errors import UserError

MAX_SIDE = 640  # pixels; a longer image is reduced when decoded, so that no batch is mostly padding

# What Pillow reads by itself, the frequent first and those without a signature last. Left out are
# what starts another program (EPS), needs one (WMF, HDF5, GRIB, BUFR, MPEG), is a table as much as
# an image (FITS), or opens a file of any format that lies within (IPTC).
FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "QOI",
    "SGI", "PCX", "PSD", "ICO", "DDS", "XBM", "TGA",
)  # fmt: skip
SUFFIXES = frozenset({  # and not those that are other things as often: .pcd, .rgb, .im, ...
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".webp", ".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".qoi", ".sgi", ".pcx", ".psd", ".ico", ".dds", ".xbm",
})  # fmt: skip
TURNS = {  # EXIF orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE = 2**21  # pixels
MOST_JPEG = 2**24  # bytes of a JPEG that is read whole before it is decoded
JPEG_SEGMENT = struct.Struct(">BBH")  # 0xFF, its kind, and its length from here on
SAMPLINGS = {b"\x11", b"\x21", b"\x22"}  # of gray: the usual ones of a JPEG's first component
SAMPLINGS |= {first + b"\x11\x11" for first in SAMPLINGS}  # of colours
EOI = b"\xff\xd9"
PROGRESSIVE = b"\xff\xc2"
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xda-\xfe])", re.DOTALL)  # one with a segment behind it
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the chunks on which they depend
SAY_RANGE = "--value-range LOW HIGH says which values become black and white"


@dataclass(frozen=True)
class Reading:
    """How stored values become 8-bit RGB: one rule for all images of a source.

    Attributes:
        alpha: "white" lays transparent images over white, "drop" leaves their last channel out; ""
            is "white" unless `settle` finds that the channel may be no alpha.
        value_range: the deep values that become 0 and 255; None: those of the file's mode and tags.
        clip: whether values beyond `value_range` are cut off, as a user who gave it wants, or make
            an image undecodable, since a sample is no promise. None cuts nothing off.
    """

    alpha: Literal["", "white", "drop"] = ""
    value_range: tuple[float, float] | None = None
    clip: bool = True

    def __post_init__(self) -> None:
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UserError(f"--value-range {low:g} {high:g}: LOW must be below HIGH")


@dataclass(frozen=True)
class Kind:
    """How a file stores its values.

    Attributes:
        own: the stored values that become 0 and 255 by mode and tags alone.
        deep: "" for what Pillow reads in full: unsigned values of up to 8 bits.
        pillow: the values that become 0 and 255 once Pillow has loaded them, where it scales.
        declared: whether the file states `own`; else 16 or 32 bits are just the next larger number.
        whole: False if Pillow gives no more than the high byte of 16-bit colour.
        hint: the largest value by a tag that need not be right.
    """

    bits: int = 8
    sign: Literal["unsigned", "signed", "float"] = "unsigned"
    own: tuple[float, float] = (0, 255)
    deep: Literal["", "gray", "colour"] = ""
    pillow: tuple[float, float] | None = None
    declared: bool = False
    whole: bool = True
    white_is_zero: bool = False
    hint: float = 0

    def __str__(self) -> str:
        sign = "" if self.sign == "unsigned" else f" {self.sign}"
        return f"{self.bits}-bit{sign}"


PLAIN = Kind()
GRAY = Kind(16, own=(0, 65535), deep="gray")
COLOUR = Kind(16, own=(0, 65535), deep="colour", pillow=(0, 255))


@dataclass
class Loaded:
    """An image file whose pixels Pillow has read, at a reduced scale if it is a large JPEG."""

    picture: Image.Image
    kind: Kind
    size: tuple[int, int]  # (width, height) in the file
    raw_mode: str  # Pillow's name of how the file lays values out
    extra_samples: tuple[int, ...]  # a TIFF's: 0 no alpha, 1 alpha that colours are multiplied by
    turn: Image.Transpose | None  # what makes it upright


@dataclass(frozen=True)
class Look:
    """What `settle` has to know of one image.

    Attributes:
        low, high: the least and the largest stored value, if `kind.deep`.
        alpha: "" no last channel for it, "tag" one that a tag explains, "odd" one that is neither
            0 nor opaque in most pixels or nowhere opaque, "plain" any other.
        hidden: whether alpha or transparency hides every pixel.
        extra: channels that are no alpha by their tag.
    """

    format: str
    mode: str
    width: int
    height: int
    kind: Kind
    low: float = 0
    high: float = 0
    alpha: Literal["", "tag", "odd", "plain"] = ""
    hidden: bool = False
    extra: int = 0
    frames: int = 1


# ---- one image -----------------------------------------------------------------------------------


def read(image: Any, reading: Reading = Reading(), max_side: int = MAX_SIDE) -> Image.Image:
    """An encoded image as an upright 8-bit RGB picture whose longer side is at most `max_side`.

    Args:
        image: `{"bytes": ..., "path": ...}`, a path, or bytes.

    Raises:
        Exception: of nearly any kind, if the image is damaged, too large or not a file, or if
            `reading` cannot show it.
    """
    source = source_of(image)
    loaded = load(source, max_side)
    picture = loaded.picture
    if loaded.kind.deep:
        picture = in_eight_bits(source, loaded, reading, max_side)
    if picture.has_transparency_data:
        picture = without_alpha(picture, reading.alpha)
    if loaded.turn is not None:  # else it copies for nothing
        picture = picture.transpose(loaded.turn)
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def plain_jpeg(source: Any, max_side: int) -> bytes | None:
    """The bytes of a JPEG that `read` only decodes; None of another file, or one that is cut off.

    It is whole, upright, of 8-bit gray or RGB in one of the usual samplings, and no side of it is
    longer than `max_side`: any libjpeg makes of it what Pillow's does, in as much memory.

    Raises:
        Exception: of nearly any kind, as `read`.
    """
    data = bytes_of_jpeg(source)
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(EOI)):
        return None
    if PROGRESSIVE in data and not has_all_scans(data):  # each libjpeg guesses what is missing
        return None
    if frame := frame_of(data):
        bits, height, width, components = struct.unpack_from(">BHHB", frame)
        size, samplings = (width, height), frame[7::3]
        if bits != 8 or len(frame) != 6 + 3 * components:
            return None
    else:
        with open_file(data) as picture:
            if picture.format != "JPEG" or turn_of(picture) is not None:
                return None
            size, samplings = picture.size, bytes(16 * h + v for _, h, v, _ in picture.layer)
    small = max(size) <= max_side and math.prod(size) <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return data if small and samplings in SAMPLINGS else None


def frame_of(jpeg: bytes) -> bytes | None:
    """The segment of a JPEG that says its size, if there is nothing else but tables and comments.

    Pillow takes five times as long, but knows what other segments mean, EXIF among them.
    """
    at, frame = 2, None
    while at + 4 <= len(jpeg):
        start, code, length = JPEG_SEGMENT.unpack_from(jpeg, at)
        content, at = at + 4, at + 2 + length
        if start != 0xFF or length < 2:
            return None
        if code == 0xDA:  # the pixels begin
            return frame
        if code in (0xC0, 0xC1, 0xC2):
            frame = jpeg[content:at]
        elif code == 0xE0:
            if length < 16 or not jpeg.startswith(b"JFIF\0", content):
                return None
        elif code not in (0xC4, 0xDB, 0xDD, 0xFE):
            return None
    return None


def bytes_of_jpeg(source: Any) -> bytes:
    """All bytes of what begins as a JPEG and is not too large; nothing of anything else."""
    if not isinstance(source, str | Path):
        return source
    with open(source, "rb") as file:
        start = file.read(3)
        jpeg = start == b"\xff\xd8\xff" and os.fstat(file.fileno()).st_size <= MOST_JPEG
        return start + file.read() if jpeg else b""


def source_of(image: Any) -> Any:
    """The path or the bytes of an image as tables and folders have them."""
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), str):
            raise OSError("a text where an image's bytes should be")
        path = image.get("path")
        if path and not image.get("bytes") and not os.path.isabs(path):
            raise OSError("a relative path in a table, and no bytes")
        image = image.get("bytes") or path
    if image is None or image == "":
        raise OSError("an empty cell")
    if isinstance(image, str | Path) and not os.path.isfile(image):
        raise OSError("no such file" if not os.path.exists(image) else "not a file")
    return image


@functools.cache
def known() -> list[str]:
    """Those of FORMATS which this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_file(source: Any) -> Any:
    """A Pillow image of a known format, whose pixels are not read yet."""
    try:
        return Image.open(
            source if isinstance(source, str | Path) else io.BytesIO(source), formats=known()
        )
    except UnidentifiedImageError:
        tiff = start_of(source, 4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        what = "image file: a TIFF of values that Pillow does not read" if tiff else "image file"
        raise OSError(f"cannot identify {what}") from None


def start_of(source: Any, size: int | None = None) -> bytes:
    """The first `size` bytes, or all."""
    if not isinstance(source, str | Path):
        return bytes(source[:size])
    with open(source, "rb") as file:
        return file.read(-1 if size is None else size)


def load(source: Any, max_side: int, wanted: Literal["", "high", "low"] = "") -> Loaded:
    """Open and decode, if need be what a slight damage has left whole.

    Args:
        wanted: of 16-bit colour, the high bytes or the low ones just as the file has them; "": the
            high bytes as Pillow reads them.
    """
    try:
        return load_as_it_is(source, max_side, wanted)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        mended = mend(source, max_side, error)
        if mended is None:
            raise
        return load_as_it_is(mended, max_side, wanted)


def load_as_it_is(source: Any, max_side: int, wanted: Literal["", "high", "low"] = "") -> Loaded:
    with open_file(source) as picture:
        size = picture.size
        picture.draft("RGB", (max_side, max_side))  # JPEG: decode at a reduced scale where enough
        if math.prod(picture.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise OSError(f"{math.prod(picture.size):,} pixels; reduce it first")
        kind, raw = kind_of(picture), raw_mode(picture)
        if kind.deep == "colour" and picture.format in ("PNG", "TIFF"):
            set_raw_modes(picture, wanted)
        samples = picture.tag_v2.get(338, ()) if picture.format == "TIFF" else ()
        picture.load()
        return Loaded(picture, kind, size, raw, samples, turn_of(picture))


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF
        return None


def without_alpha(picture: Image.Image, alpha: str) -> Image.Image:
    """Over white, or with the last channel left out; as if opaque where all would be hidden.

    Raises:
        OSError: what is over white would be all of one colour, though the picture is not.
    """
    picture = picture.convert("LA") if picture.mode == "La" else picture
    if alpha == "drop":
        picture.info.pop("transparency", None)
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    if hides_all(rgba):
        return rgba.convert("RGB")
    over = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if is_one_colour(over) and not is_one_colour(rgba):
        raise OSError("all of it is one colour over white; --alpha drop leaves its alpha out")
    return over


def hides_all(rgba: Image.Image) -> bool:
    return rgba.getchannel("A").getextrema()[1] == 0


def is_one_colour(rgba: Image.Image) -> bool:
    return all(low == high for low, high in rgba.getextrema())  # type: ignore[misc]


# ---- slight damage -------------------------------------------------------------------------------


def mend(source: Any, max_side: int, error: Exception) -> bytes | None:
    """The file without what does not touch its pixels, if that may be all that is wrong with it."""
    try:
        start = start_of(source, 8)
        if start[:2] == b"\xff\xd8" and "truncated" in str(error):
            return without_end(start_of(source), max_side)
        if start == b"\x89PNG\r\n\x1a\n":
            return without_metadata(start_of(source))
        if start[4:] == b"ftyp" and "Exif" in str(error):  # an AVIF, whose turn stands elsewhere
            return start_of(source).replace(b"Exif", b"none", 1)
    except Exception:  # the first error says more
        pass
    return None


def without_metadata(data: bytes) -> bytes | None:
    """A PNG with the chunks alone on which its pixels depend; None if it has no others."""
    parts, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end], "big")
        sound = zlib.crc32(data[at + 4 : end - 4]) == checksum
        if end > len(data) or name in PNG_PIXELS or (name in (b"eXIf", b"sBIT") and sound):
            parts.append(data[at:end])
        at = end
    kept = b"".join(parts)
    return kept if len(kept) < len(data) else None


def without_end(data: bytes, max_side: int) -> bytes | None:
    """A JPEG with its end marker, if that is all it lacks.

    What is missing from the coded pixels is filled up with zeros. If it is the same with anything
    else there, nothing was missing.
    """
    data = data[:-1] if data.endswith(b"\xff") else data
    ends = [bytes([byte]) * 64 for byte in b"\xaa\x55\xfe\xc3\x3c\x96"]
    if b"\xff\xdd" in data:  # it may be cut just before a restart marker
        ends += [b"\xff" + bytes([0xD0 + i]) + end for i in range(8) for end in ends[:3]]
    pixels = load_as_it_is(data + EOI, max_side).picture.tobytes()
    for end in ends:
        if load_as_it_is(data + end + EOI, max_side).picture.tobytes() != pixels:
            return None
    return data + EOI if has_all_scans(data) else None


def has_all_scans(data: bytes) -> bool:
    """Whether a JPEG has each coefficient of each component to its last bit."""
    missing: dict[tuple[int, int], int] = {}  # (component, coefficient): bits
    at = 2
    while found := JPEG_MARKER.search(data, at):
        code, at = found[1][0], found.end() + 2
        length = int.from_bytes(data[at - 2 : at], "big") - 2
        segment = data[at : at + length]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):  # start of the frame
            missing = {(component, k): 16 for component in segment[6::3] for k in range(64)}
        elif code == 0xDA:  # start of a scan
            components, (first, last, bits) = segment[1:-3:2], segment[-3:]
            for component in components:
                missing |= {(component, k): bits & 15 for k in range(first, last + 1)}
        at += length
    return not any(missing.values())


# ---- kinds of stored values ----------------------------------------------------------------------


def kind_of(picture: Any) -> Kind:
    """By mode and tags, of an opened file whose pixels are not read yet."""
    mode, raw = picture.mode, raw_mode(picture)
    if picture.format in ("JPEG", "MPO"):
        return PLAIN
    if picture.format == "TIFF":
        return kind_of_tiff(picture)
    if picture.format == "JPEG2000":
        return kind_of_jpeg2000(picture)
    if picture.format == "PPM" and mode != "F":
        return kind_of_ppm(picture)
    if picture.format == "SGI" and (picture.tile[0][0] == "SGI16" or ";16" in raw):
        return replace(COLOUR, whole=False)
    if picture.format == "PNG" and ";16" in raw:
        return replace(GRAY if mode.startswith("I") else COLOUR, hint=significant(picture))
    if mode.startswith("I;16"):
        return GRAY
    if mode == "I":
        return Kind(32, "signed", (-(2**31), 2**31 - 1), "gray")
    return Kind(32, "float", (0, 1), "gray") if mode == "F" else PLAIN


def kind_of_tiff(picture: Any) -> Kind:
    def first(tag: int, default: int) -> int:
        value = picture.tag_v2.get(tag, default)
        value = value[0] if isinstance(value, tuple) and value else value
        return value if isinstance(value, int) else default

    bits, form, hint = first(258, 1), first(339, 1), first(281, 0)
    if bits == 16 and picture.mode in ("RGB", "RGBA", "CMYK"):
        # libtiff picks the high bytes itself where the planes are separate.
        whole = picture.tile[0][0] != "libtiff" or first(284, 1) == 1
        return replace(COLOUR, whole=whole, hint=hint)
    if picture.mode[0] not in "IF" and not (picture.mode == "L" and form == 2):
        return PLAIN
    kind = Kind(bits, "unsigned", (0, 2**bits - 1), "gray", None, bits == 12, hint=hint)
    if form == 2:
        kind = replace(kind, sign="signed", own=(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    elif form == 3:
        kind = replace(kind, sign="float", own=(0, 1))
    return replace(kind, white_is_zero=first(262, 0) == 0)


def kind_of_jpeg2000(picture: Any) -> Kind:
    """By the SIZ marker. Pillow shifts values to 8 or 16 bits, and signed ones to above 0."""
    place = picture.fp.tell()
    picture.fp.seek(0)
    data = picture.fp.read()
    picture.fp.seek(place)
    size = data[data.index(b"\xff\x4f\xff\x51") + 42]  # Ssiz: bits - 1, the top bit if signed
    bits, half = (size & 127) + 1, 2 ** (size & 127) if size > 127 else 0
    if bits <= 8 and not half:
        return PLAIN
    kind = Kind(bits, "signed" if half else "unsigned", (-half, 2**bits - 1 - half))
    if picture.mode in ("L", "I;16"):
        top = 255 if picture.mode == "L" else 65535
        return replace(kind, deep="gray", pillow=(0, top), declared=bits != 16)
    return replace(kind, deep="colour", pillow=(0, 255), declared=bits != 16, whole=False)


def kind_of_ppm(picture: Any) -> Kind:
    decoder, args = picture.tile[0][0], picture.tile[0][3]
    largest = 65535 if decoder == "raw" else args[-1]
    kind = replace(COLOUR, own=(0, largest), declared=largest != 65535)
    if picture.mode == "I":
        return replace(kind, deep="gray", pillow=(0, 65535))
    return kind if decoder != "raw" and largest != "1;I" and largest > 255 else PLAIN


def raw_mode(picture: Any) -> str:
    args = picture.tile[0][3] if picture.tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def set_raw_modes(picture: Any, wanted: Literal["", "high", "low"]) -> None:
    """Have Pillow read one byte of each 16-bit colour of a PNG or TIFF.

    It takes the low byte for the high one if it is told that that comes first.
    """
    tiles = []
    for tile in picture.tile:
        raw = tile[3] if isinstance(tile[3], str) else tile[3][0]
        if raw in ("X", ";"):  # a plane that is left out, for which Pillow has no name
            continue
        if len(raw) == 1:  # a plane of an uncompressed TIFF, which it would read as 8 bits
            raw += ";16L" if picture.tag_v2.prefix[:2] == b"II" else ";16B"
        if wanted:
            raw = raw.replace("RGBa", "RGBA").replace("LA;16B", "RGBA")
        if wanted == "low":
            first = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
            raw = raw if raw == "RGBA" else raw[:-1] + ("B" if first else "L")
        args = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        tiles.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args))
    picture.tile = tiles


def significant(picture: Any) -> int:
    """The largest value of a PNG by its sBIT chunk. Not all who write it scale to 16 bits."""
    place = picture.fp.tell()
    picture.fp.seek(0)
    found = re.search(rb"sBIT(.)", picture.fp.read(1024), re.DOTALL)
    picture.fp.seek(place)
    return 2 ** found[1][0] - 1 if found else 0


# ---- deep values to 8 bits -----------------------------------------------------------------------


def in_eight_bits(source: Any, loaded: Loaded, reading: Reading, max_side: int) -> Image.Image:
    """A deep picture in 8 bits a channel, with an alpha channel where it has transparency.

    Raises:
        OSError: values are not finite, beyond a range that no user gave, or would all become one.
    """
    import numpy as np

    picture, kind = loaded.picture, loaded.kind
    given = reading.value_range is not None
    low, high = reading.value_range or kind.own
    if (low, high) == kind.own and kind.deep == "colour":
        eight = colours(picture)
    elif (low, high) == kind.own and kind.pillow:
        eight = scaled(np.asarray(picture), *kind.pillow)
    else:
        stored = stored_values(source, loaded, max_side)
        least, largest = stored.min(), stored.max()
        if not (math.isfinite(least) and math.isfinite(largest)):  # NaN where there is any
            raise OSError(f"{kind} values that are no finite numbers")
        if (least < low or largest > high) and not (given and reading.clip):
            raise OSError(
                f"{kind} values from {number(least)} to {number(largest)}, beyond {number(low)} to "
                f"{number(high)}; {SAY_RANGE}"
            )
        eight = scaled(stored, low, high)
    keyed = "transparency" in picture.info  # a stored value, which 8 bits cannot hold
    if not (varied(eight) or keyed) and varied(stored := stored_values(source, loaded, max_side)):
        raise OSError(
            f"{kind} values from {number(stored.min())} to {number(stored.max())} are one where "
            f"{number(low)} to {number(high)} become 0 to 255; {SAY_RANGE}"
        )
    if kind.white_is_zero:
        eight = 255 - eight
    mode = "L" if eight.ndim == 2 else "CMYK" if eight.shape[2] == 4 else "RGB"
    result = Image.frombytes(mode, picture.size, eight.tobytes())
    if picture.mode in ("LA", "RGBA"):
        result.putalpha(picture.getchannel("A"))
    elif keyed:
        stored = stored_values(source, loaded, max_side).reshape(*eight.shape[:2], -1)
        hidden = (stored == np.array(picture.info["transparency"])).all(2)
        result.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return result


def stored_values(source: Any, loaded: Loaded, max_side: int) -> Any:
    """(H, W) or (H, W, C) array of a deep picture's values as the file has them, without alpha.

    Raises:
        OSError: Pillow does not give them.
    """
    import numpy as np

    picture, kind = loaded.picture, loaded.kind
    values = np.asarray(picture)
    if not kind.whole:
        raise OSError(f"{kind} colour, of which Pillow reads the high bits alone")
    if kind.deep == "colour" and picture.format == "PPM":
        return stored_ppm(source)
    if kind.deep == "colour":
        low = np.asarray(load(source, max_side, "low").picture).astype(np.uint16)
        if loaded.raw_mode == "LA;16B":  # high, low, and those of alpha
            return low[..., 0] * 256 + low[..., 1]
        values = np.asarray(load(source, max_side, "high").picture) * np.uint16(256) + low
        if 1 in loaded.extra_samples:
            alpha = np.maximum(values[..., 3:], 1)
            values = np.minimum(values * np.uint64(65535) // alpha, 65535)
        return values[..., :3] if picture.mode == "RGBA" else values
    if picture.format == "JPEG2000":
        shift = max(0, (8 if picture.mode == "L" else 16) - kind.bits)
        return (values >> shift).astype(np.int32) + int(kind.own[0])
    if kind.pillow:  # a PGM, scaled to 16 bits
        return np.rint(values * (kind.own[1] / 65535)).astype(np.int32)
    if kind.bits == 8:
        return values.view(np.int8)
    return values.view(np.uint32) if kind.own[1] == 2**32 - 1 else values


def stored_ppm(source: Any) -> Any:
    """(H, W, 3) uint16 of a PPM of more than 8 bits."""
    import numpy as np

    with open_file(source) as picture:
        decoder, _, offset, _ = picture.tile[0]
        shape = (picture.height, picture.width, 3)
    data = start_of(source)[offset:]
    if decoder == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", data).split()
        return np.array(text[: math.prod(shape)]).astype(np.uint16).reshape(shape)
    return np.frombuffer(data, ">u2", math.prod(shape)).reshape(shape)


def scaled(values: Any, low: float, high: float) -> Any:
    """uint8 of the same shape: `low` becomes 0 and `high` 255, and what is beyond is cut off.

    Integers are rounded down, as 16 bits have always been here, floats to the nearest.
    """
    import numpy as np

    eight = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // max(1, values[0].size))  # at once: float64 takes eight times as much
    for start in range(0, len(values), rows):
        part = (values[start : start + rows].astype(np.float64) - low) * 255 / (high - low)
        part = np.rint(part) if values.dtype.kind == "f" else part
        eight[start : start + rows] = np.clip(part, 0, 255)
    return eight


def colours(picture: Image.Image) -> Any:
    """(H, W, C) uint8 without alpha."""
    import numpy as np

    return np.asarray(picture.convert("RGB") if picture.mode in ("LA", "RGBA") else picture)


def varied(values: Any) -> bool:
    """Whether (H, W) or (H, W, C) values hold more than one value or colour."""
    return bool((values.min((0, 1)) != values.max((0, 1))).any())


# ---- a look at one of a sample -------------------------------------------------------------------


def look_at(image: Any) -> Look:
    """What one image of a sample says of its source.

    Raises:
        Exception: of nearly any kind, if the image is damaged; its pixels may be damaged without.
    """
    source = source_of(image)
    if look := at_a_glance(source):
        return look
    loaded = load(source, 1)  # a JPEG at an eighth of its size
    picture, kind = loaded.picture, loaded.kind
    low: float = 0
    high: float = 0
    if kind.deep and kind.whole:
        stored = stored_values(source, loaded, 1)
        low, high = stored.min().item(), stored.max().item()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise OSError(f"{kind} values that are no finite numbers")
    elif kind.deep:  # what the high bits can have been
        eight, unit = colours(picture), (kind.own[1] - kind.own[0] + 1) / 256
        low = kind.own[0] + unit * int(eight.min())
        high = kind.own[0] + unit * (int(eight.max()) + 1) - 1
    alpha: Literal["", "tag", "odd", "plain"] = ""
    hidden = False
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        counts = picture.getchannel(len(picture.getbands()) - 1).histogram()
        total, clear, opaque = sum(counts), counts[0], counts[255]
        odd = clear + opaque < total / 2 or (opaque == 0 and clear < total)
        shallow = kind.deep and opaque == 0  # 12 bits of alpha in 16, whatever the tag says
        tagged = any(loaded.extra_samples) and not shallow
        alpha = "tag" if tagged else "odd" if odd else "plain"
        hidden = clear == total
    elif picture.has_transparency_data and not kind.deep:
        hidden = hides_all(picture.convert("RGBA"))
    return Look(
        picture.format or "",
        picture.mode,
        *loaded.size,
        kind,
        low,
        high,
        alpha,
        hidden,
        loaded.extra_samples.count(0),
        frames_of(source),
    )


def at_a_glance(source: Any) -> Look | None:
    """The look at a large image whose head says all; its pixels would take a tenth of a second."""
    with contextlib.suppress(Exception), open_file(source) as picture:
        plain = not kind_of(picture).deep and not picture.has_transparency_data
        if plain and math.prod(picture.size) > LARGE and not getattr(picture, "is_animated", False):
            width, height = picture.size
            return Look(picture.format, picture.mode, width, height, PLAIN)
    return None


def frames_of(source: Any) -> int:
    with contextlib.suppress(Exception), open_file(source) as picture:
        if picture.format not in ("MPO", "PSD"):  # the first is the photograph, the rest its parts
            return getattr(picture, "n_frames", 1)
    return 1


def number(value: float) -> str:
    return f"{value:,.0f}" if value % 1 == 0 else f"{value:,.4g}"
