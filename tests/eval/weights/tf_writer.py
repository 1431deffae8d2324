"""TensorFlow's checkpoints, written by tests as TensorFlow writes them.

write_bundle(prefix, {key: array})                    TF1's Saver
write_object_checkpoint(prefix, {full_name: array})   TF2's, whose names stand in an object graph
write_object_checkpoint(folder, ..., saved_model=True)

The checksums are `eval.weights.tensorflow.crc32c`'s, which is tested against published values.
"""

import numpy as np
import pyarrow

from eval.weights.tensorflow import GRAPH, MAGIC, TRAILER, VALUE, crc32c

NUMBERS = {  # of types.proto
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8,
    "int64": 9, "bool": 10, "uint16": 17, "complex128": 18, "float16": 19, "uint32": 22,
    "uint64": 23,
}  # fmt: skip
STRING, BFLOAT16 = 7, 14
HEADER = b"\x08%c\x1a\x02\x08\x01"  # a BundleHeaderProto: so many shards, version 1


def write_bundle(
    prefix, arrays, *, compress=False, shards=1, block_size=2**18, bfloat16=(), lies=()
):
    """Write PREFIX.index and its shards.

    Args:
        arrays: {key: array, or bytes, which become one text}, in the order of the shards.
        compress: whether the table is compressed by Snappy.
        bfloat16: keys of float32 arrays that keep the upper half of each value.
        lies: {key: {argument of `entry`: another value}}.
    """
    data, pairs, lies = [bytearray() for _ in range(shards)], [(b"", HEADER % shards)], dict(lies)
    for i, (key, array) in enumerate(arrays.items()):
        if isinstance(array, bytes):
            stored, fields = text_tensor(array), {"dtype": STRING, "shape": ()}
            checked = len(array).to_bytes(4, "little") + stored[-len(array) - 4 :]
        else:
            array = np.asarray(array)
            number = BFLOAT16 if key in bfloat16 else NUMBERS[str(array.dtype)]
            fields = {"dtype": number, "shape": array.shape}
            values = array.view(np.uint32) >> 16 if key in bfloat16 else array
            checked = stored = values.astype("<u2" if key in bfloat16 else array.dtype).tobytes()
        shard = i % shards
        fields |= {"shard": shard, "offset": len(data[shard]), "size": len(stored)}
        fields |= {"crc": mask(crc32c(checked))}
        pairs.append((key.encode(), entry(**fields | lies.get(key, {}))))
        data[shard] += stored
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(sorted(pairs), compress, block_size))
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}").write_bytes(content)


def write_object_checkpoint(path, arrays, saved_model=False, slots=(), **options):
    """Write a TF2 checkpoint of the variables {full name: array}, at the prefix or folder `path`.

    Args:
        slots: {full name of a variable: {name of its slot, as "momentum": array}}.
    """
    slots, values, variables, references = dict(slots), {}, [], []
    for i, (full_name, array) in enumerate(arrays.items()):
        where = f"variables/{i}" if saved_model else f"model/all_variables/{i}"
        values[where + VALUE] = array
        variables.append((full_name, where + VALUE))
        for slot, array in slots.get(full_name, {}).items():
            key = f"{where}/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}"
            values[key] = array
            references.append((full_name, slot, f"{full_name}/{slot}", key))
    values[GRAPH] = object_graph(variables, references)
    if saved_model:
        path.mkdir(parents=True, exist_ok=True)
        (path / "saved_model.pb").write_bytes(b"\x08\x01")  # its version alone: nobody reads more
        path = path / "variables" / "variables"
    write_bundle(path, values, **options)


def object_graph(variables, slots=()):
    """A TrackableObjectGraph.

    Args:
        variables: (full name, key) of each.
        slots: (full name of the variable, name of the slot, full name of the slot, key) of each.
    """
    leaves = [*variables, *((full_name, key) for _, _, full_name, key in slots)]
    root = field(1, field(1, 1) + field(2, b"model"))
    root += field(1, field(1, 2) + field(2, b"optimizer"))
    first = 3  # the nodes before: the root, the model and the optimizer
    children = [field(1, field(1, first + i) + field(2, b"%d" % i)) for i in range(len(variables))]
    owners = {full_name: first + i for i, (full_name, _) in enumerate(variables)}
    references = [
        field(3, field(1, owners[owner]) + field(2, slot.encode()) + field(3, first + i))
        for i, (owner, slot, _, _) in enumerate(slots, len(variables))
    ]
    nodes = [root, b"".join(children), b"".join(references)]
    for full_name, key in leaves:
        texts = (b"VARIABLE_VALUE", full_name.encode(), key.encode())
        tensor = b"".join(field(i, text) for i, text in enumerate(texts, 1) if text)
        nodes.append(field(2, tensor) + b"\x2a\x02\x08\x01")  # has_checkpoint_values
    return b"".join(field(1, node) for node in nodes)


def text_tensor(text):
    """A string tensor of one text, as in a shard."""
    length = len(text).to_bytes(4, "little")
    return varint(len(text)) + mask(crc32c(length)).to_bytes(4, "little") + text


def entry(*, dtype, shape, shard, offset, size, crc, slices=()):
    """A BundleEntryProto. As in protobuf, numbers that are 0 are left out."""
    axes = b"".join(field(2, field(1, axis) if axis else b"") for axis in shape)
    numbers = [(3, shard), (4, offset), (5, size)]
    return (
        field(1, dtype)
        + field(2, axes)
        + b"".join(field(i, number) for i, number in numbers if number)
        + b"\x35"
        + crc.to_bytes(4, "little")
        + b"".join(field(7, each) for each in slices)
    )


def table(pairs, compress=False, block_size=2**18):
    """A sorted table of (key, value)."""
    blocks, ends, pending, size = [], [], [], 0
    for i, (key, value) in enumerate(pairs, 1):
        pending.append((key, value))
        size += len(key) + len(value)
        if size >= block_size or i == len(pairs):
            blocks.append(sealed(block(pending), compress))
            # a key that is not before the block's last; behind all, TensorFlow has the shortest
            last = i == len(pairs) and b"" < key[:1] < b"\xff"
            ends.append(bytes([key[0] + 1]) if last else key)
            pending, size = [], 0
    return assembled(blocks, ends, compress)


def assembled(blocks, ends, compress=False):
    """A table of sealed blocks, and a key at or behind the end of each."""
    metaindex, at, handles = sealed(block([]), compress), 0, []
    for each in [*blocks, metaindex]:
        handles.append(varint(at) + varint(len(each) - TRAILER))
        at += len(each)
    index = sealed(block(zip(ends, handles, strict=False)), compress)
    footer = handles[-1] + varint(at) + varint(len(index) - TRAILER)
    return b"".join([*blocks, metaindex, index, footer.ljust(40, b"\0"), MAGIC])


def sealed(content, compress=False):
    """A block with its trailer."""
    packed = pyarrow.compress(content, codec="snappy", asbytes=True) if compress else content
    return trailed(packed, compress)


def trailed(packed, kind):
    """What is stored of a block, with its kind of compression and its checksum."""
    packed += bytes([kind])
    return packed + mask(crc32c(packed)).to_bytes(4, "little")


def block(pairs, restart=16):
    """Entries whose keys leave out what they share with the key before."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    ends = [*(restarts or [0]), len(restarts) or 1]
    return bytes(out) + np.array(ends, "<u4").tobytes()


def mask(crc):
    """As TensorFlow stores a checksum (lib/hash/crc32c.h)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def field(number, value):
    """A field of a protobuf: a number, or a message or text of bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value):
    """A number, of which a negative one takes ten bytes."""
    out, value = bytearray(), value % 2**64
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
