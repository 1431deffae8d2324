"""TensorFlow's checkpoints without TensorFlow: a table of small protobufs beside raw arrays.

    X.index                     a sorted table from a variable's key to its type, shape, shard,
                                offset, size and CRC-32C
    X.data-00000-of-00002       a shard: the values, little-endian, as they lie in memory

TF1's Saver, TF2's object checkpoints and a SavedModel's `variables` are all of this format. TF2's
keys are paths through objects; the variables' names stand in an entry of their own, the object
graph. The formats are described by TensorFlow's tensor_bundle.proto, trackable_object_graph.proto
and lib/io/format.h, LevelDB's doc/table_format.md and Snappy's format_description.txt.

Anyone may have written the files: what an index says is compared with the sizes of the files before
a value is read, so that nothing is allocated beyond what is there, and every checksum is checked.
"""

import contextlib
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, printable

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")  # the end of every table
FOOTER = 48  # bytes
TRAILER = 5  # bytes behind a block: how it is compressed, its checksum
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the key of TF2's object graph
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # the end of the key of a TF2 variable
SLOT = "/.OPTIMIZER_SLOT/"  # within the key of a variable that belongs to an optimizer

# Far above what a checkpoint of a ResNet needs: an index with momentum has a few thousand entries.
# They bound the time and memory that a file made for the purpose can take.
MOST_BYTES = 2**24  # of an index, one of its blocks when uncompressed, and the object graph
MOST_ENTRIES = 100_000
MOST_KEY, MOST_KEYS = 2**12, 2**25  # bytes of one key, and of all keys

DTYPES = {  # of types.proto: the name, and how NumPy reads it
    1: ("float32", "<f4"), 2: ("float64", "<f8"), 3: ("int32", "<i4"), 4: ("uint8", "u1"),
    5: ("int16", "<i2"), 6: ("int8", "i1"), 8: ("complex64", "<c8"), 9: ("int64", "<i8"),
    10: ("bool", "u1"), 14: ("bfloat16", "<u2"), 17: ("uint16", "<u2"), 18: ("complex128", "<c16"),
    19: ("float16", "<f2"), 22: ("uint32", "<u4"), 23: ("uint64", "<u8"),
}  # fmt: skip
STRING = 7


def find(path: Path) -> Path | None:
    """The prefix X of the checkpoint that a path means; None if it means none.

    Args:
        path: X, X.index, X.meta, a shard, a SavedModel's folder or its saved_model.pb, or a folder
            with one checkpoint, or with several and a file `checkpoint` that names the latest.

    Raises:
        UserError: a folder has several checkpoints and does not say which is the latest; a part of
            a checkpoint has no index beside it.
    """
    if path.name == "saved_model.pb":
        path = path.parent
    if path.is_dir():
        if (path / "variables" / "variables.index").is_file():
            return path / "variables" / "variables"
        prefixes = sorted(file.with_suffix("") for file in path.glob("*.index") if file.is_file())
        if len(prefixes) > 1 and (latest := _latest(path)) in prefixes:
            return latest
        if len(prefixes) > 1:
            names = printable(", ".join(prefix.name for prefix in prefixes))
            raise UserError(f"{path}: has several checkpoints; give one of them: {names:.500}")
        return prefixes[0] if prefixes else None
    prefix = Path(re.sub(r"\.(index|meta|data-\d{5,}-of-\d{5,})$", "", str(path)))
    if _index_of(prefix).is_file():
        return prefix
    if prefix != path and path.is_file():
        raise UserError(f"{path}: part of a TensorFlow checkpoint whose .index is not beside it")
    return None


def _latest(folder: Path) -> Path | None:
    """What the file `checkpoint` calls the latest: a name, or a path on the machine of training."""
    path = folder / "checkpoint"
    text = path.read_bytes()[: 2**16].decode(errors="replace") if path.is_file() else ""
    found = re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE)
    return folder / re.split(r"[/\\]", found[1])[-1] if found else None


def _index_of(prefix: Path) -> Path:
    return Path(f"{prefix}.index")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A fault that the block finds in the file, as a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        reason = f"cannot be read as a TensorFlow checkpoint ({printable(str(error))})"
        raise UserError(f"{path}: {reason}; fetch or save it again") from error


@dataclass(frozen=True)
class _Entry:
    """What the index says of one variable."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int  # bytes
    crc: int  # masked
    slices: int  # into how many the variable is partitioned; each has an entry of its own


class Checkpoint:
    """The variables of a checkpoint by name; values are read when they are asked for.

    Attributes:
        names: the key of each variable by its name. TF1's names are the keys. TF2's are the full
            names in the object graph; a variable without one, or with one that another has as
            well, goes by its object path.
        slots: the names of TF2's variables that belong to an optimizer, such as momentum. In TF1
            only their names tell.
        notes: lines on what the object graph left open, for the user.

    Raises:
        UserError: a file is missing, damaged or lies about the others.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.index = prefix, _index_of(prefix)
        self.names: dict[str, str] = {}
        self.slots: frozenset[str] = frozenset()
        self.notes: list[str] = []
        with _reading(self.index):
            if not self.index.is_file():
                raise OSError("no such file")
            if self.index.stat().st_size > MOST_BYTES:
                raise ValueError(f"larger than {MOST_BYTES:,} bytes, which no index is")
            table = _table(self.index.read_bytes())
            key, header = next(table, (b"x", b""))
            if key:
                raise ValueError("its first entry is not the header")
            self._shards = _shards(header)
            entries = {key: _entry(key, value) for key, value in table}
            # saved_tensor_slice_util.cc: the key of a slice of a partitioned variable begins with 0
            variables = {key: each for key, each in entries.items() if key[0] != 0}
            partitioned = any(each.slices for each in variables.values())
            if partitioned != (len(variables) < len(entries)):
                raise ValueError("it has slices without their variable, or the reverse")
            self._entries = {_text(key): each for key, each in variables.items()}
        self._check(entries)
        self._find_names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a variable, with TensorFlow's order of axes."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The stored type of a variable: "float32", "bfloat16", ..., "string"."""
        return _type_name(self._entry(name).dtype)

    def read(self, name: str) -> NDArray[Any]:
        """The values of a variable; of bfloat16, which NumPy lacks, widened to float32.

        Raises:
            UserError: it has no numbers, is partitioned, or its checksum is wrong.
        """
        entry, shown = self._entry(name), f"{self.index}: {printable(name):.200}"
        if entry.slices:
            raise UserError(
                f"{shown}: partitioned into {entry.slices} slices, which are not joined here; save "
                "the checkpoint without a partitioner"
            )
        if entry.dtype not in DTYPES:
            raise UserError(f"{shown}: of type {_type_name(entry.dtype)}, which is not read here")
        data = self._read(entry, name)
        with _reading(self._shard(entry.shard)):
            if _mask(crc32c(data)) != entry.crc:
                raise ValueError(f"the checksum of {name:.200} is wrong")
        kind, stored = DTYPES[entry.dtype]
        values = data.view(stored).reshape(entry.shape)
        if kind == "bool":
            return values.astype(np.bool_)
        if kind == "bfloat16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _entry(self, name: str) -> _Entry:
        if name not in self.names:
            raise UserError(f"{self.index}: has no variable {printable(name):.200}")
        return self._entries[self.names[name]]

    def _shard(self, shard: int) -> Path:
        return Path(f"{self.prefix}.data-{shard:05}-of-{self._shards:05}")

    def _check(self, entries: dict[bytes, _Entry]) -> None:
        """Every entry lies within its shard, and no two share a byte, as writers have it.

        So all values together are no larger than the files.
        """
        of_shard = defaultdict(list)
        for key, each in entries.items():
            if not each.slices:
                of_shard[each.shard].append((each.offset, each.size, key))
        for shard, places in sorted(of_shard.items()):
            with _reading(self.index):
                if not 0 <= shard < self._shards:
                    raise ValueError(f"a variable in shard {shard} of {self._shards}")
            path = self._shard(shard)
            with _reading(path):
                if not path.is_file():
                    raise OSError("no such file, and the .index names it")
                length, end = path.stat().st_size, 0
                for offset, size, key in sorted(place for place in places if place[1]):
                    if offset < end:
                        raise ValueError(f"{key!r:.200} overlaps another variable")
                    end = offset + size
                    if end > length:
                        raise ValueError(
                            f"{key!r:.200} ends at byte {end:,}, the file at {length:,}"
                        )

    def _read(self, entry: _Entry, name: str) -> NDArray[np.uint8]:
        """The bytes of an entry, of which `_check` has seen that they are there."""
        path = self._shard(entry.shard)
        with _reading(path):
            data = np.fromfile(path, np.uint8, entry.size, offset=entry.offset)
            if data.size != entry.size:
                raise ValueError(f"it became shorter while {name:.200} was read")
            return data

    def _find_names(self) -> None:
        """Find each variable's name, and say which names the object graph does not settle."""
        keys = [key for key in self._entries if key != GRAPH]
        if GRAPH not in self._entries:
            self.names = {key: key for key in keys}
            return
        with _reading(self._shard(self._entries[GRAPH].shard)):
            full_names, slots = _object_graph(self._read_text(self._entries[GRAPH]))
            slots |= {key for key in keys if SLOT in key}
            claims = defaultdict(list)
            for key in keys:
                claims[full_names.get(key) or key.removesuffix(VALUE)].append(key)
            unsettled = []
            for name, claimants in claims.items():
                owners = [key for key in claimants if key not in slots]
                named = next((each for each in (claimants, owners) if len(each) == 1), [])
                unsettled += [] if named else [name]
                for key in claimants:
                    own = name if key in named else key.removesuffix(VALUE)
                    if self.names.setdefault(own, key) != key:
                        raise ValueError(f"its object graph names two variables {own:.200}")
        self.slots = frozenset(name for name, key in self.names.items() if key in slots)
        absent = full_names.keys() - self._entries.keys()
        for what, texts in (
            ("names that several variables have, which go by their object paths", unsettled),
            ("variables of the object graph that are not in the checkpoint", absent),
        ):
            if texts:
                listed = printable(", ".join(sorted(texts)))
                self.notes.append(f"{what}: {len(texts)} ({listed:.200})")

    def _read_text(self, entry: _Entry) -> bytes:
        """The one text of an entry: its length, a checksum of that, and the bytes.

        Both checksums take the length as four bytes (tensor_bundle.cc, WriteStringTensor).
        """
        if entry.dtype != STRING or entry.shape or entry.slices or entry.size > MOST_BYTES:
            raise ValueError(f"the object graph is not one text of at most {MOST_BYTES:,} bytes")
        data = self._read(entry, GRAPH).tobytes()
        length, at = _varint(data, 0)
        if at + 4 + length != len(data):
            raise ValueError("the object graph's length is wrong")
        check, text = data[at : at + 4], data[at + 4 :]
        counted = length.to_bytes(4, "little")
        if _mask(crc32c(counted)) != int.from_bytes(check, "little"):
            raise ValueError("the checksum of the object graph's length is wrong")
        if _mask(crc32c(counted + check + text)) != entry.crc:
            raise ValueError("the checksum of the object graph is wrong")
        return text


# ---- protobufs -----------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 64 bits, 7 of them to a byte, the lowest first; and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if value >= 2**64:
                break
            return value, at + i + 1
    raise ValueError("a number that does not end, or is too large")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field, value) of a message: an int64, or the bytes of anything else.

    A field that the caller does not know, or whose value is not of the kind that it expects, is for
    it to pass over, as in protobuf: later versions of a format add fields.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value - 2**64 if value >= 2**63 else value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if length > len(data) - at:
            raise ValueError("a field that ends behind its message")
        yield field, data[at : at + length]
        at += length


def _numbers(data: bytes, field: int) -> list[int]:
    """The values of a message's field of numbers, of which protobuf takes the last for one."""
    return [value for each, value in _fields(data) if each == field and isinstance(value, int)]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name {data!r:.200} is not UTF-8") from None


def _shards(data: bytes) -> int:
    """The number of shards, of a BundleHeaderProto that this reader understands."""
    shards, big_endian, needs = 0, 0, 0
    for field, value in _fields(data):
        match field, value:
            case 1, int():
                shards = value
            case 2, int():
                big_endian = value
            case 3, bytes():  # a VersionDef, whose field 2 is the version that a reader must have
                needs = max(_numbers(value, 2), default=0)
    if big_endian:
        raise ValueError("written on a big-endian machine, which is not read here")
    if needs > 1:
        raise ValueError(f"version {needs} of the format, of which 1 is read here")
    if not 0 <= shards < 2**31:
        raise ValueError(f"{shards} shards")
    return shards


def _entry(key: bytes, data: bytes) -> _Entry:
    """A BundleEntryProto, whose size must be that of its type and shape."""
    dtype = shard = offset = size = slices = crc = 0
    shape: list[int] = []
    for field, value in _fields(data):
        match field, value:
            case 1, int():
                dtype = value
            case 2, bytes():
                shape += _shape(key, value)
            case 3, int():
                shard = value
            case 4, int():
                offset = value
            case 5, int():
                size = value
            case 6, bytes():
                crc = int.from_bytes(value, "little")
            case 7, bytes():
                slices += 1
    if offset < 0 or size < 0:
        raise ValueError(f"{key!r:.200} at byte {offset}, {size} bytes long")
    # NumPy takes at least 32 axes; where one is 0, the others must still make a size of 63 bits.
    if len(shape) > 32 or min(shape, default=0) < 0 or math.prod(n or 1 for n in shape) >= 2**56:
        raise ValueError(f"{key!r:.200} of shape {shape!r:.200}")
    if dtype in DTYPES and not slices:
        needed = math.prod(shape) * np.dtype(DTYPES[dtype][1]).itemsize
        if size != needed:
            raise ValueError(f"{key!r:.200} has {size:,} bytes, its shape {needed:,}")
    return _Entry(dtype, tuple(shape), shard, offset, size, crc, slices)


def _shape(key: bytes, data: bytes) -> list[int]:
    """The axes of a TensorShapeProto."""
    axes = []
    for field, value in _fields(data):
        match field, value:
            case 2, bytes():
                axes.append([0, *_numbers(value, 1)][-1])
            case 3, int() if value:
                raise ValueError(f"{key!r:.200} has no known shape")
    return axes


def _object_graph(data: bytes) -> tuple[dict[str, str], set[str]]:
    """Of a TrackableObjectGraph: the full name of each key, and the keys of slot variables."""
    full_names: dict[str, str] = {}
    node_of: dict[str, int] = {}
    slot_nodes: set[int] = set()
    nodes = (value for field, value in _fields(data) if field == 1 and isinstance(value, bytes))
    for node_id, node in enumerate(nodes):
        for field, value in _fields(node):
            match field, value:
                case 2, bytes():  # a SerializedTensor
                    texts = {f: v for f, v in _fields(value) if isinstance(v, bytes)}
                    key, full_name = (_text(texts.get(f, b"")) for f in (3, 2))
                    if key in node_of:
                        raise ValueError(f"its object graph has {key:.200} twice")
                    full_names[key], node_of[key] = full_name, node_id
                case 3, bytes():  # a SlotVariableReference
                    slot_nodes.update(_numbers(value, 3))
    return full_names, {key for key, node_id in node_of.items() if node_id in slot_nodes}


def _type_name(dtype: int) -> str:
    return (
        "string" if dtype == STRING else DTYPES.get(dtype, (f"number {dtype} of types.proto",))[0]
    )


# ---- the table -----------------------------------------------------------------------------------


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) of a sorted table, whose keys rise strictly."""
    if not data.endswith(MAGIC):
        raise ValueError("it does not end as a table of TensorFlow's does")
    footer, at = data[-FOOTER:], 0
    for _ in range(2):  # where another index lies, which nobody uses
        _, at = _varint(footer, at)
    end, last, count, total = 0, None, 0, 0
    for _, handle in _block(data, *_handle(footer, at)):
        offset, size = _handle(handle, 0)
        if offset < end:  # also keeps the same block from being read over and over
            raise ValueError("its blocks overlap")
        end, before = offset + size + TRAILER, count
        for key, value in _block(data, offset, size):
            if last is not None and key <= last:
                raise ValueError(f"the key {key!r:.200} is there twice, or out of order")
            last, count, total = key, count + 1, total + len(key)
            if count > MOST_ENTRIES or total > MOST_KEYS:
                raise ValueError(f"more than {MOST_ENTRIES:,} variables, or too long names")
            yield key, value
        if count == before:  # checking a file of nothing else would take very long
            raise ValueError("an empty block")


def _handle(data: bytes, at: int) -> tuple[int, int]:
    """Where a block begins, and its length without the trailer."""
    offset, at = _varint(data, at)
    size, _ = _varint(data, at)
    return offset, size


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) of a block. Each entry says how much of the key before it begins its own."""
    end = offset + size
    if end + TRAILER > len(data) - FOOTER:
        raise ValueError("a block that ends behind the file")
    kind, crc = data[end], int.from_bytes(data[end + 1 : end + TRAILER], "little")
    if _mask(crc32c(data[offset : end + 1])) != crc:
        raise ValueError("the checksum of a block is wrong")
    if kind > 1:
        raise ValueError(f"a block of compression {kind}, which is not read here")
    block = snappy(data[offset:end]) if kind else data[offset:end]
    # At the end stand the places where a key is whole, for a search, and their number.
    stop = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if stop < 0:
        raise ValueError("a block that is shorter than it says")
    at, key = 0, b""
    while at < stop:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or own + length > stop - at:
            raise ValueError("an entry that ends behind its block")
        if shared + own > MOST_KEY:
            raise ValueError(f"a name of {shared + own:,} bytes")
        key = key[:shared] + block[at : at + own]
        at += own + length
        yield key, block[at - length : at]


def snappy(data: bytes) -> bytes:
    """The raw format of Snappy, uncompressed.

    Raises:
        ValueError: it does not become what it claims to.
    """
    length, at = _varint(data, 0)
    if length > MOST_BYTES or 3 * length > 64 * len(data):  # 3 bytes copy at most 64
        raise ValueError(f"a block that claims to become {length:,} bytes")
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        kind, count = tag & 3, (tag >> 2) + 1
        if kind == 0:  # a literal; of more than 60 bytes, its length follows in 1 to 4 bytes
            width = max(0, count - 60)
            if width:
                count = int.from_bytes(data[at : at + width], "little") + 1
            at += width
            if count > len(data) - at:
                raise ValueError("compressed data that end too early")
            out += data[at : at + count]
            at += count
        else:  # a copy of what came out before, from up to 2^11, 2^16 or 2^32 bytes back
            width = 4 if kind == 3 else kind
            if width > len(data) - at:
                raise ValueError("compressed data that end too early")
            back = int.from_bytes(data[at : at + width], "little")
            at += width
            if kind == 1:
                back, count = back | tag >> 5 << 8, (tag >> 2 & 7) + 4
            if not 0 < back <= len(out):
                raise ValueError("compressed data that copy from before their beginning")
            begin = len(out) - back
            piece = out[begin : begin + count]  # shorter where the copy runs into itself
            out += (piece * -(-count // len(piece)))[:count]
        if len(out) > length:
            raise ValueError("compressed data that become more than they claim")
    if len(out) != length:
        raise ValueError("compressed data that become less than they claim")
    return bytes(out)


# ---- CRC-32C -------------------------------------------------------------------------------------

POLYNOMIAL = 0x82F63B78  # Castagnoli's, RFC 3720, with the bits in reverse
LANES = 14  # 2^14 words of 32 bits side by side: what NumPy is quickest with, within a cache


def _mask(crc: int) -> int:
    """As TensorFlow stores a checksum, lest one be taken of what holds one (lib/hash/crc32c.h)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@functools.cache
def _behind(power: int) -> NDArray[np.uint32]:
    """(4, 256): what 2^power zero bytes make of a checksum, the XOR of one value for each byte.

    A checksum is linear over GF(2), so 32 columns say it all: bit i becomes columns[i].
    """
    one = np.uint32(1)
    columns = one << np.arange(32, dtype=np.uint32)
    if power:
        columns = _shift(_shift(columns, power - 1), power - 1)
    else:
        for _ in range(8):
            columns = columns >> one ^ (columns & one) * np.uint32(POLYNOMIAL)
    tables = np.zeros((4, 256), np.uint32)
    for i, column in enumerate(columns):
        byte, bit = divmod(i, 8)
        tables[byte, 1 << bit : 2 << bit] = tables[byte, : 1 << bit] ^ column
    return tables


def _shift(crcs: NDArray[np.uint32], power: int) -> NDArray[np.uint32]:
    """(N,) checksums, each after 2^power zero bytes more."""
    tables, values = _behind(power), crcs.view(np.uint8).reshape(-1, 4)
    result = tables[0][values[:, 0]]
    for i in range(1, 4):
        result ^= tables[i][values[:, i]]
    return result


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """The CRC-32C (Castagnoli) of bytes, at hundreds of MB a second.

    The bytes are rows of words of 32 bits, one for each lane; a step moves the checksums of all
    lanes on by a row, and takes in the row. In the end the first half of the lanes joins the
    second, until there is one. A checksum that begins at 0 stays there while zeros come, so zeros
    fill up the first rows; then four bytes take it to the initial value of the standard, all ones.
    """
    values = np.frombuffer(data, np.uint8)
    power = min(LANES, (values.size // 4).bit_length())
    lanes = 1 << power
    head = values.size % (4 * lanes)
    first = np.zeros(8 * lanes, np.uint8)  # two rows, which always hold the four bytes and the head
    first[first.size - head - 4 : first.size - head] = (0x54, 0x64, 0x1F, 0x64)
    first[first.size - head :] = values[:head]
    crcs = np.zeros(lanes, np.uint32)
    for part in (first, values[head:]):
        for row in part.view("<u4").reshape(-1, lanes):
            crcs = _shift(crcs, power + 2) ^ row
    while len(crcs) > 1:
        power -= 1
        earlier, later = np.split(crcs, 2)
        crcs = _shift(earlier, power + 2) ^ later
    return int(_shift(crcs, 2)[0]) ^ 0xFFFFFFFF
