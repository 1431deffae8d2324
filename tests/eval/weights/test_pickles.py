"""BYOL's checkpoints are read without running them, and no lie in one costs memory or a crash."""

import pickle
import tracemalloc

import numpy as np
import pytest

from common.errors import UserError
from eval.weights import pickles
from tests.eval.weights.pickle_writer import write_byol
from tests.helpers import golden_json

PARAMS = {
    "res_net50/~/initial_conv": {"w": np.linspace(-1, 1, 24, dtype="f4").reshape(2, 3, 4)},
    "classifier": {"w": np.arange(6, dtype="f4").reshape(3, 2).T, "b": np.full(100, 2.5, "f4")},
}
STATE = {"projector/batch_norm/~/mean_ema": {"counter": np.array(7, "i4"), "average": np.ones(9)}}


def assert_equal(ours, theirs, more=0):
    assert ours.keys() == theirs.keys()
    for module, arrays in theirs.items():
        assert ours[module].keys() == arrays.keys()
        for name, array in arrays.items():
            assert type(ours[module][name]) is np.ndarray
            assert ours[module][name].dtype == array.dtype
            np.testing.assert_array_equal(ours[module][name], array + array.dtype.type(more))


# ---- what such a file holds ----------------------------------------------------------------------


@pytest.mark.parametrize("mapping", ["frozendict", "FlatMapping", "dict", "script"])
@pytest.mark.parametrize("leaves", ["numpy", "old jax", "jax"])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("nested", [False, True])
def test_read(tmp_path, mapping, leaves, core, nested):
    path = write_byol(tmp_path / "x.pkl", PARAMS, STATE, 3, mapping, leaves, core, nested)
    assert f"c{core}.multiarray\n_reconstruct\n".encode() in path.read_bytes()
    read = pickles.read(path)
    assert list(read) == [*pickles.TREES, "step"] and read["step"] == 3
    for name, tree in zip(pickles.TREES, (PARAMS, STATE, PARAMS, STATE), strict=True):
        assert_equal(read[name], tree, more="target" in name)


def of_all_names(most=None):
    """Random arrays for all variables of a ResNet-50, in sizes of at most `most` along an axis."""
    generator = np.random.default_rng(0)
    trees = []
    for variables in golden_json("variable_names")["byol"]["full_pretrain_resnet50"].values():
        tree = {}
        for variable, shape in variables:
            module, _, name = variable.rpartition("/")
            size = [min(each, most or each) for each in shape]
            counter = np.array(len(tree), "i4")
            values = generator.standard_normal(size, "f4") if shape else counter
            tree.setdefault(module, {})[name] = values
        trees.append(tree)
    return trees


@pytest.mark.parametrize("most", [16, pytest.param(None, marks=pytest.mark.slow)])
def test_a_file_of_all_variables_of_a_resnet50(tmp_path, most):
    params, state = of_all_names(most)
    assert [sum(map(len, tree.values())) for tree in (params, state)] == [171, 330]
    read = pickles.read(write_byol(tmp_path / "x.pkl", params, state, np.int64(312_500)))
    assert_equal(read["online_params"], params)
    assert_equal(read["online_state"], state)
    assert_equal(read["target_params"], params, more=1)
    assert read["step"] == 312_500


def test_a_state_alone_is_read_too(tmp_path):
    content = {"online_params": PARAMS, "online_state": STATE, "other": 1.5}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    read = pickles.read(path)
    assert list(read) == ["online_params", "online_state"]
    assert_equal(read["online_params"], PARAMS)


# ---- what is refused -----------------------------------------------------------------------------


def refusal(path, content=None):
    """The one line of the refusal, for which hardly any memory was taken."""
    if content is not None:
        path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        pickles.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * path.stat().st_size + 200_000  # an operation of a byte makes a small object
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")


def of(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def call(function, *args):
    return function + b"(" + b"".join(args) + b"tR"


def program(body):
    return b"\x80\x02" + body + b"."


NDARRAY = named("numpy", "ndarray")
DTYPE = named("numpy", "dtype")
RECONSTRUCT = named("numpy.core.multiarray", "_reconstruct")
CREATE_ARRAY = named("dill._dill", "_create_array")
NAMEDTUPLE = named("dill._dill", "_create_namedtuple")
ENCODE = named("_codecs", "encode")
SETATTR = named("__builtin__", "setattr")
FLAT_MAPPING = named("haiku._src.data_structures", "FlatMapping")
FLOATS = call(DTYPE, of("f4"), of(False), of(True))
EMPTY = call(RECONSTRUCT, NDARRAY, of((0,)), call(ENCODE, of("b"), of("latin1")))
FOUR_BYTES = call(ENCODE, of("\0\0\0\0"), of("latin1"))


def array(shape=(1,), dtype=FLOATS, data=FOUR_BYTES, version=1, fortran=False):
    return EMPTY + b"(" + of(version) + of(shape) + dtype + of(fortran) + data + b"tb"


def deep(levels):
    return b")" + b"\x85" * levels


HOSTILE = {
    "an extension": (b"\x82\x01", "operation"),
    "a persistent id": (b"Px\n", "operation"),
    "a binary persistent id": (b"NQ", "operation"),
    "an instance": (b"(ios\nsystem\n", "operation"),
    "an object": (b"(" + SETATTR + b"o", "operation"),
    "a name on the stack": (of("os") + of("system") + b"\x93", "operation"),
    "a bytearray of 2**60": (b"\x96" + (2**60).to_bytes(8, "little"), "operation"),
    "a frame of 2**60": (b"\x95" + (2**60).to_bytes(8, "little"), "operation"),
    "a text of 4 GB": (b"X\xff\xff\xff\xff", "4,294,967,295 bytes are to come, of which 1 are"),
    "a memo of 2**32": (b"Nr\xff\xff\xff\xff", "holds nothing by a name"),
    "nothing remembered": (b"h\x05", "KeyError: 5"),
    "an empty stack": (b"", "IndexError"),
    "a mark too few": (b"t", "IndexError"),
    "a name without an end": (b"c" + b"x" * 1000, "a name without an end"),
    "deep tuples": (deep(100_000), "holds nothing by a name"),
    "a deep key": (b"}" + deep(100_000) + b"Ns", "no text"),
    "a number as a key": (b"}K\x01Ns", "no text"),
    "a key twice": (b"}(" + (of("w") + b"N") * 2 + b"u", "twice"),
    "a key without a value": (b"}(" + of("w") + b"u", "shorter"),
    "an item of a function": (SETATTR + of("w") + b"Ns", "no dictionary"),
    "an item of an array": (array() + b"Na", "no list"),
    "items of a dictionary": (b"}(Ne", "no list"),
    "a call of a class": (call(NDARRAY, of(1)), "no function"),
    "a call of a text": (call(of("w"), of(1)), "no function"),
    "a call without a tuple": (SETATTR + of("abc") + b"R", "no function"),
    "a call of too few": (call(SETATTR, of(1)), "TypeError"),
    "an object of a function": (SETATTR + b")\x81", "no class"),
    "an object of too few": (
        call(NAMEDTUPLE, of("S"), of(("a", "b")), of("m")) + of((1,)) + b"\x81",
        "shorter",
    ),
    "fields of numbers": (call(NAMEDTUPLE, of("S"), of((1,)), of("m")), "fields"),
    "a field twice": (call(NAMEDTUPLE, of("S"), of(("a", "a")), of("m")), "two fields"),
    "a million fields": (call(NAMEDTUPLE, of("S"), of(("a",) * 101), of("m")), "fields"),
    "an attribute of a number": (call(SETATTR, of(1), of("real"), of(2)), "an attribute"),
    "an attribute of a function": (call(SETATTR, SETATTR, of("x"), of(2)), "an attribute"),
    "an attribute of an array": (call(SETATTR, array(), of("x"), of(2)), "an attribute"),
    "a state of a function": (SETATTR + of({"__doc__": "x"}) + b"b", "a state"),
    "a state of a dictionary": (b"}" + of({"x": 1}) + b"b", "a state"),
    "a state of a class": (NDARRAY + of({"x": 1}) + b"b", "a state"),
    "a dictionary of a text": (call(FLAT_MAPPING, of("x")), "dictionary of Haiku's"),
    "an array by a function": (call(CREATE_ARRAY, SETATTR, b")", of((1,))), "not made by NumPy"),
    "an array of half a state": (EMPTY + of((1, (1,))) + b"b", "ValueError"),
    "an array of objects": (array(dtype=call(DTYPE, of("O8"), *map(of, "xx"))), "'O8'"),
    "an array of texts": (array(dtype=call(DTYPE, of("U1"), *map(of, "xx"))), "'U1'"),
    "doublings": (call(DTYPE, b")" + b"q\0h\0\x86" * 100, *map(of, "xx")), "type unknown"),
    "bfloat16": (array(dtype=call(DTYPE, of("V2"), *map(of, "xx"))), "'V2'"),
    "big-endian": (FLOATS + of((3, ">", None, None, None, -1, -1, 0)) + b"b", "byte order"),
    "fields of a type": (FLOATS + of((3, "|", None, ("a",), None, 4, 4, 0)) + b"b", "composed"),
    "no type": (array(dtype=of("f4")), "unknown layout"),
    "another version": (array(version=2), "unknown layout"),
    "no order": (array(fortran=3), "unknown layout"),
    "too few bytes": (array(shape=(2,)), "shape (2,) and float32 in 4 bytes"),
    "10 GB of zeros": (array(shape=(50_000, 50_000)), "in 4 bytes"),
    "a negative shape": (array(shape=(-1, -1)), "impossible shape"),
    "a huge shape": (array(shape=(2**60, 0)), "impossible shape"),
    "a true shape": (array(shape=(True,)), "impossible shape"),
    "a shape of texts": (array(shape=("1",)), "impossible shape"),
    "nine axes": (array(shape=(1,) * 9), "without a shape"),
    "a number as a shape": (array(shape=1), "without a shape"),
    "a list as bytes": (array(data=of([1.0])), "without bytes"),
    "a text beyond latin1": (call(ENCODE, of("\u4e2d"), of("latin1")), "UnicodeEncodeError"),
    "a long one": (call(ENCODE, of("\u4e2d" * 300), of("latin1")), "UnicodeEncodeError"),
    "another encoding": (call(ENCODE, of("b"), of("rot13")), "latin1"),
    "surrogates": (b"X\x03\0\0\0\xed\xb2\x80", "UnicodeDecodeError"),
    "a dictionary of none of it": (of({"a\nb\x1b": 1}), "holds a"),
    "of linear evaluation": (
        of({"experiment_state": {"backbone_params": {}, "classif_params": {}}}),
        "holds backbone_params, classif_params, no online_params",
    ),
    "modules of a list": (of({"online_params": [], "online_state": {}}), "dictionary of modules"),
    "a module of a list": (of({"online_params": {"a": []}, "online_state": {}}), "of arrays"),
    "a text as an array": (
        of({"online_params": {"a": {"w": "x"}}, "online_state": {}}),
        "a, w of its online_params is not an array",
    ),
    "an array without values": (
        b"}(" + of("online_params") + b"}" + of("a") + b"}" + of("w") + EMPTY + b"ss"
        + of("online_state") + b"}u",
        "a, w of its online_params is not an array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    body, reason = HOSTILE[case]
    assert reason in refusal(tmp_path / "x.pkl", program(body))


@pytest.mark.parametrize("module", ["os", "posix", "builtins", "dill._dill", "numpy"])
def test_an_unknown_name_is_refused_and_nothing_is_run(tmp_path, module):
    mark = tmp_path / "mark"
    body = call(named(module, "system"), of(f"touch {mark}"))
    said = refusal(tmp_path / "x.pkl", program(body))
    what = f"asks for {module}.system, which is not in a BYOL checkpoint"
    assert said == f"{what}; nothing was run" and not mark.exists()


@pytest.mark.parametrize("step", [-1, "3", 2.5, None, True, np.arange(2), np.float32(2)])
def test_step(tmp_path, step):
    path = write_byol(tmp_path / "x.pkl", PARAMS, STATE, step)
    if step is None:
        assert "step" not in pickles.read(path)
    else:
        assert refusal(path) == "its step is not a number of steps"


def test_every_beginning_of_a_file_is_refused(tmp_path):
    path = tmp_path / "x.pkl"
    whole = write_byol(path, PARAMS, STATE).read_bytes()
    for size in range(0, len(whole), 11):
        refusal(path, whole[:size])
    assert "1 bytes follow its end" in refusal(path, whole + b"\0")


def test_a_changed_byte_is_refused_or_read(tmp_path):
    path = tmp_path / "x.pkl"
    whole = write_byol(path, PARAMS, STATE).read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for place in range(2, len(whole), 15):
        changed = bytearray(whole)
        changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            pickles.read(path)
        except UserError:
            refused += 1
    assert refused > 30


def test_small_steps_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_READS", 1_000)
    assert "far more steps" in refusal(tmp_path / "x.pkl", program(b"N0" * 1_000))


def test_other_files(tmp_path):
    path = tmp_path / "x.pkl"
    assert "protocol 2" in refusal(path, b"")
    assert "protocol 2" in refusal(path, pickle.dumps({}, protocol=4))
    for bad in (tmp_path, tmp_path / "none.pkl"):
        with pytest.raises(UserError, match="cannot be read"):
            pickles.read(bad)
