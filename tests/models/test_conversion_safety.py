"""A checkpoint is somebody else's file: nothing in it runs, and it cannot make more of itself than it is."""

from __future__ import annotations

import collections
import gzip
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.models.safe_pickle import Array, load_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load(data: bytes, folder: Path, **options: Any) -> Any:
    path = folder / "data.pkl"
    path.write_bytes(data)
    return load_pickle(path, **options)


def plain(tree: Any) -> Any:
    """Arrays as numpy's, so that trees compare."""
    if isinstance(tree, Array):
        return tree.tensor.numpy()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return type(tree)(map(plain, tree)) if isinstance(tree, (list, tuple)) else tree


def assert_equal(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(actual, expected)
    elif isinstance(expected, (list, tuple, dict)):
        pairs = (
            zip(actual.items(), expected.items(), strict=True)
            if isinstance(expected, dict)
            else zip(actual, expected, strict=True)
        )
        for one, other in pairs:
            assert_equal(one, other)
    else:
        assert actual == expected or (actual != actual and expected != expected)


ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(1, 2, 0),
    np.arange(7, dtype=">f4") / 3,
    np.arange(5, dtype=">i8"),
    np.zeros((3, 0, 2), np.float32),
    np.array(2.5, np.float16),
    np.array([True, False]),
    np.array([1 + 2j], np.complex64),
    np.arange(3, dtype=np.uint8),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_containers_come_back(protocol, tmp_path):
    shared = [1, 2]
    tree = {
        "arrays": ARRAYS,
        "scalars": (1, -(2**70), 2.5, True, None, "tëxt", b"by\xfftes", b"", (), [], {}),
        "nested": [({"a": (1,)}, [shared, shared])] * 3,
    }
    result = load(pickle.dumps(tree, protocol), tmp_path)
    assert_equal(plain(result), tree)
    assert result["nested"][0][1][0] is result["nested"][0][1][1]
    scalars = load(pickle.dumps([np.float32(2.5), np.int64(-3), np.bool_(True)], protocol), tmp_path)
    assert scalars == [2.5, -3, True]
    assert [type(value) for value in scalars] == [float, int, bool]
    ordered = load(pickle.dumps(collections.OrderedDict(b=1, a=2), protocol), tmp_path)
    assert list(ordered.items()) == [("b", 1), ("a", 2)]
    if protocol >= 4:
        assert load(pickle.dumps([{1, 2}, frozenset("ab"), bytearray(b"x")], protocol), tmp_path)[0] == {1, 2}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_of_numpy_1_load(protocol, tmp_path):
    """numpy 1 wrote ``numpy.core`` where numpy 2 writes ``numpy._core``."""
    data = pickle.dumps([np.arange(3, dtype=np.float32), np.float64(4)], protocol)
    assert b"numpy._core" in data
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = module.replace(b"_core", b"core")
        data = data.replace(bytes([len(module)]) + module, bytes([len(old)]) + old).replace(module, old)
    array, number = load(data, tmp_path)
    assert_equal(array.tensor.numpy(), np.arange(3, dtype=np.float32))
    assert number == 4.0


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    """An object of a class."""

    def __init__(self) -> None:
        self.x = 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch hacked"), r"(posix|nt)\.system"),
        (Runs(eval, "open('hacked', 'w')"), r"(builtins|__builtin__)\.eval"),
        (Runs(getattr, 1, "real"), r"getattr"),
        (Runs(np.load, "hacked"), r"numpy.*load"),
        (torch.zeros(1), "torch"),
        (np.dtype, "dtype|holds a|names"),
        (np.ma.masked_array([1.0]), "numpy.ma"),
        (os, None),
        (range(3), "range"),
        (1j, "complex"),
    ],
)
def test_whatever_else_is_named_is_refused(value, name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name is None:
        # Written by hand: an instance of a class, as the oldest protocol has it.
        data, name = b"(ios\nsystem\n.", "INST"
    elif value is np.dtype:
        data, name = b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93}b.", "sets the state of a _Name"
    else:
        data = pickle.dumps(value, protocol)
    with pytest.raises(ValueError, match=name):
        load(data, tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_of_classes_are_refused(protocol, tmp_path):
    with pytest.raises(ValueError, match=r"names copyreg|names copy_reg|names .*Plain"):
        load(pickle.dumps({"a": Plain()}, protocol), tmp_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.array([{}, None], dtype=object),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(2, dtype="V2"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(array, protocol, tmp_path):
    with pytest.raises(ValueError, match=r"dtype '[OUSVM]"):
        load(pickle.dumps(array, protocol), tmp_path)


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


F4 = called("numpy", "dtype", text("f4"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated or no pickle"),
        (b"hello", "truncated or no pickle"),
        (pickle.dumps([1, 2, 3])[:-1], "truncated or no pickle"),
        (pickle.dumps(np.arange(100))[:-50], "truncated or no pickle"),
        (gzip.compress(pickle.dumps(np.arange(100)), mtime=0)[:-30], "truncated or no pickle"),
        (gzip.compress(pickle.dumps([1]), mtime=0)[:6] + b"\xff" * 30, "truncated or no pickle"),
        (raw(), "truncated or no pickle"),
        (raw(b"t"), "truncated or no pickle"),
        (raw(b"h\x07"), "truncated or no pickle"),
        (raw(b"K\x01a"), "truncated or no pickle"),
        (raw(b"K\x01K\x02a"), "truncated or no pickle"),
        (raw(b"K\x01)R"), "calls a int"),
        (raw(b"Q"), "opcode BINPERSID"),
        (raw(b"\x82\x01"), "opcode EXT1"),
        (raw(text("os"), text("system"), b"\x93)\x81"), "names os.system"),
        (raw(b"}]K\x01s"), "has a list for a key"),
        (raw(b"})K\x01s"), "has a tuple for a key"),
        (raw(called("numpy._core.numeric", "_frombuffer", b"C\x04abcd", F4, b"K\x02\x85", text("C"))), "with 4 bytes"),
        (
            raw(called("numpy._core.numeric", "_frombuffer", b"C\x04abcd", F4, b"J\xff\xff\xff\xff\x85", text("C"))),
            "shape",
        ),
        (raw(called("numpy._core.numeric", "_frombuffer", b"C\x04abcd", F4, b"K\x01\x85", text("Z"))), "unknown order"),
        (
            raw(called("numpy._core.numeric", "_frombuffer", b"C\x04abcd", b"K\x01", b"K\x01\x85", text("C"))),
            "plain numbers",
        ),
        (raw(called("_codecs", "encode", text("x"), text("utf-7"))), "encodes text as 'utf-7'"),
    ],
)
def test_broken_and_crafted_files_are_named(data, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load(data, tmp_path)
    assert "data.pkl" in str(caught.value)


HUGE = 2**40
DECLARED = {
    "BINBYTES8": b"\x8e" + struct.pack("<Q", HUGE),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", HUGE),
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", HUGE),
    "BINBYTES": b"B" + struct.pack("<I", 2**31 - 1),
    "LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "FRAME": b"\x95" + struct.pack("<Q", HUGE) + b"N",
    "LONG_BINPUT": b"Nr" + struct.pack("<I", 2**32 - 1),
    "shape": called(
        "numpy._core.numeric",
        "_frombuffer",
        b"C\x00",
        F4,
        b"\x8a\x06" + HUGE.to_bytes(6, "little") + b"\x85",
        text("C"),
    ),
}


@pytest.mark.parametrize("within_limit", [False, True])
@pytest.mark.parametrize("name", DECLARED)
def test_no_declared_size_is_believed(name, within_limit, tmp_path):
    """Some declare what is not there, and memory must stay small, whether the limit would allow it or not."""
    data = b"\x80\x05" + DECLARED[name] + b"."
    tracemalloc.start()
    try:
        with_error = name not in ("FRAME", "LONG_BINPUT")
        options = {"max_bytes": 4 * HUGE if within_limit else 10_000}
        if with_error:
            with pytest.raises(ValueError, match=r"max_bytes|truncated|with 0 bytes"):
                load(data, tmp_path, **options)
        else:
            load(data, tmp_path, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6, peak


def test_a_gzip_bomb_stops_at_the_limit(tmp_path):
    path = tmp_path / "bomb.pkl.gz"
    bomb = pickle.dumps(b"\0" * 50_000_000)
    path.write_bytes(gzip.compress(bomb, 1))
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than max_bytes=1000000 bytes"):
            load_pickle(path, max_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert len(load_pickle(path, max_bytes=60_000_000)) == 50_000_000


def test_what_a_file_makes_counts_as_well(tmp_path):
    """One string of a megabyte, and an opcode or two for each array made of it."""
    array = called("numpy._core.numeric", "_frombuffer", b"h\x00", b"h\x01", b"h\x02", text("C"))
    body = b"B" + struct.pack("<I", 10**6) + b"\0" * 10**6 + b"\x940" + F4 + b"\x940"
    body += b"J" + struct.pack("<i", 250_000) + b"\x85\x940]("
    data = b"\x80\x05" + body + array * 100 + b"e."
    assert len(pickletools.optimize(data)) < 1.1e6
    with pytest.raises(ValueError, match="its arrays hold more than max_bytes=5000000 bytes"):
        load(data, tmp_path, max_bytes=5_000_000)
    assert len(load(data, tmp_path, max_bytes=200_000_000)) == 100


def test_deep_nesting_is_no_problem_of_the_reader(tmp_path):
    tree = load(b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", tmp_path)
    depth = 1
    while tree:
        (tree,) = tree
        depth += 1
    assert depth == 100_000


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"])
def test_the_limit_is_a_number_of_bytes(limit, tmp_path):
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1"):
        load(pickle.dumps([]), tmp_path, max_bytes=limit)
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "nothing.pkl")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_value_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    for start in (b"", b"\x80\x04", pickle.dumps([np.arange(3), {"a": (1, 2.5)}])[:-7]):
        try:
            load(start + data, folder, max_bytes=10**6)
        except ValueError:
            continue


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    ),
    st.sampled_from(PROTOCOLS),
)
def test_plain_values_are_what_pickle_makes_of_them(tmp_path_factory, value, protocol):
    data = pickle.dumps(value, protocol)
    assert_equal(load(data, tmp_path_factory.mktemp("plain")), pickle.load(io.BytesIO(data)))
