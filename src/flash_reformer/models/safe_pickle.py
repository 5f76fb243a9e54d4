"""Reading pickles of numbers without running anything that they say.

Python's unpickler calls whatever a file names. This one is a small stack machine of its own: it knows the opcodes for
numbers, text and plain containers, and the few names under which numpy arrays are written (numpy 1 and 2, protocols 0
to 5). Any other name, and any other opcode, is refused by name, before anything was made of it.

A file can also attack by size. So nothing is allocated on the word of a declared size: bytes count against a limit as
they are read, decompressed, and again as arrays are made of them.
"""

from __future__ import annotations

import gzip
import math
import os
import pickletools
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: What a file may hold, decompressed, unless the caller says otherwise: 8 GiB.
MAX_BYTES = 8 * 2**30
_PIECE = 2**24
_GZIP = b"\x1f\x8b"
_ALLOWED = "only numpy arrays, numbers, text and plain containers are read"

_DTYPES = {
    "b1": torch.bool,
    "c8": torch.complex64,
    "c16": torch.complex128,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
}


def load_pickle(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Read a pickle, gzipped or not. Arrays come as :class:`Array`, their numbers and containers as themselves.

    Args:
        path: the file.
        max_bytes: limit on the bytes read, after decompression, and on the bytes of arrays made of them.

    Raises:
        ValueError: for a file that names anything but arrays and plain containers, holds arrays of objects, exceeds
            ``max_bytes``, is truncated or is no pickle.
        OSError: for a file that cannot be opened.
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ValueError(f"max_bytes must be an integer >= 1; got {max_bytes!r}")
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP
        file.seek(0)
        try:
            if not compressed:
                return _Machine(max_bytes).run(_Stream(file, max_bytes))
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _Machine(max_bytes).run(_Stream(unzipped, max_bytes))
        except _Refusal as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        except (
            # What pickletools, gzip and a stack without enough on it raise.
            *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RecursionError),
            *(struct.error, zlib.error, gzip.BadGzipFile),
        ) as error:
            raise ValueError(f"{os.fspath(path)} is truncated or no pickle: {error}") from error


class _Refusal(ValueError):
    """Something that is understood and not wanted."""


class _Stream:
    """What pickletools reads from: at most ``limit`` bytes in all."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._used = 0

    def tell(self) -> int:
        return self._used

    def _claim(self, size: int) -> None:
        self._used += size
        if self._used > self._limit:
            raise _Refusal(f"it declares or holds more than max_bytes={self._limit} bytes")

    def read(self, size: int) -> bytes:
        self._claim(size)
        parts = []
        while size > 0:
            # In pieces: a reader asked for everything at once would allocate what the file merely declares.
            part = self._file.read(min(size, _PIECE))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readline(self) -> bytes:
        line = self._file.readline(self._limit - self._used + 1)
        self._claim(len(line))
        return line


class _Dtype:
    """A plain number type; ``BUILD`` gives it its byte order."""

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or name not in _DTYPES:
            raise _Refusal(f"it holds an array of dtype {name!r}; allowed: {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[name]
        self.swapped = False

    def build(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_rest = state
        if order not in ("<", ">", "|", "=") or (subdtype, names, fields) != (None, None, None):
            raise _Refusal("it holds an array of structures; allowed are arrays of plain numbers")
        self.swapped = order == ">"


class Array:
    """A numpy array of the file, as a tensor."""

    def __init__(self) -> None:
        self.tensor: Tensor = torch.empty(0)

    def fill(self, dtype: object, shape: object, raw: object, order: object, budget: _Budget) -> None:
        """Set the tensor from the bytes of all elements in C or Fortran order."""
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise _Refusal("it holds an array that is not made of plain numbers")
        sizes = shape if isinstance(shape, tuple) else ()
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
            raise _Refusal(f"it holds an array of shape {shape!r}")
        if math.prod(sizes) * dtype.dtype.itemsize != len(raw):
            raise _Refusal(f"it holds an array of shape {sizes} and {dtype.dtype} with {len(raw)} bytes of data")
        if order not in ("C", "F"):
            raise _Refusal(f"it holds an array in the unknown order {order!r}")
        budget.spend(len(raw))
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        if dtype.swapped:
            flat = flat.view(-1, dtype.dtype.itemsize).flip(-1).contiguous().flatten()
        elements = flat.view(dtype.dtype)
        if order == "F":
            self.tensor = elements.view(sizes[::-1]).permute(*range(len(sizes) - 1, -1, -1))
        else:
            self.tensor = elements.view(sizes)


class _Budget:
    """Bytes that may still be made: a few opcodes can name the same big string again and again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = 0

    def spend(self, size: int) -> None:
        self.spent += size
        if self.spent > self.limit:
            raise _Refusal(f"its arrays hold more than max_bytes={self.limit} bytes")


class _EmptyArray(Array):
    """What ``_reconstruct`` leaves, until ``BUILD`` fills it."""

    def __init__(self, budget: _Budget) -> None:
        super().__init__()
        self._budget = budget

    def build(self, state: Any) -> None:
        *_version, shape, dtype, is_fortran, raw = state
        self.fill(dtype, shape, raw, "F" if is_fortran else "C", self._budget)


class _Name:
    """A global that may be called: what it stands for here."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def _allowed_names(budget: _Budget) -> dict[str, _Name]:
    def from_buffer(raw: object, dtype: object, shape: object, order: object, axes: Any = None) -> Array:
        array = Array()
        array.fill(dtype, shape, raw, "C" if order == "K" and axes is not None else order, budget)
        if order == "K":
            array.tensor = array.tensor.permute(*axes)
        return array

    def scalar(dtype: object, raw: object = None) -> Any:
        array = Array()
        array.fill(dtype, (), raw, "C", budget)
        return array.tensor.item()

    def encode(text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refusal(f"it encodes text as {encoding!r}; {_ALLOWED}")
        budget.spend(len(text))
        return text.encode("latin1")

    def copied(raw: bytes = b"") -> bytes:
        if not isinstance(raw, bytes):
            raise _Refusal(f"it makes bytes of a {type(raw).__name__}; {_ALLOWED}")
        return raw

    names: dict[str, Callable[..., Any]] = {
        "numpy.ndarray": lambda *_: _EmptyArray(budget),
        "numpy.dtype": _Dtype,
        "_codecs.encode": encode,
        "collections.OrderedDict": dict,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = lambda *_: _EmptyArray(budget)
        names[f"{core}.multiarray.scalar"] = scalar
        names[f"{core}.numeric._frombuffer"] = from_buffer
    for builtins in ("builtins", "__builtin__"):
        names[f"{builtins}.bytes"] = names[f"{builtins}.bytearray"] = copied
    return {name: _Name(call) for name, call in names.items()}


_MARK = object()
_PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def _hashable(key: Any) -> Any:
    # A tuple can be nested deeper than hashing it survives.
    if not (key is None or isinstance(key, (str, bytes, int, float))):
        raise _Refusal(f"it has a {type(key).__name__} for a key; {_ALLOWED}")
    return key


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_hashable, items[::2]), items[1::2], strict=True))


class _Machine:
    """The stack, the memo and the opcodes that work on them."""

    def __init__(self, limit: int) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._names = _allowed_names(_Budget(limit))

    def run(self, stream: _Stream) -> Any:
        """Execute the opcodes of a stream and return what ``STOP`` finds."""
        stack = self._stack
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            name = opcode.name
            if name in _PUSHED:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise _Refusal(f"it uses the opcode {name}; {_ALLOWED}")
                step(argument)
        raise EOFError("no end")

    def _since_mark(self) -> list[Any]:
        stack, items = self._stack, []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _tuple_of(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(items[::-1]))

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: None) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: None) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: None) -> None:
        self._tuple_of(3)

    def _list(self, _: None) -> None:
        self._stack.append(self._since_mark())

    def _dict(self, _: None) -> None:
        self._stack.append(_pairs(self._since_mark()))

    def _frozenset(self, _: None) -> None:
        self._stack.append(frozenset(map(_hashable, self._since_mark())))

    def _last(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError(f"a {kind.__name__} was expected")
        return self._stack[-1]

    def _append(self, _: None) -> None:
        item = self._stack.pop()
        self._last(list).append(item)

    def _appends(self, _: None) -> None:
        items = self._since_mark()
        self._last(list).extend(items)

    def _additems(self, _: None) -> None:
        items = self._since_mark()
        self._last(set).update(map(_hashable, items))

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._last(dict)[_hashable(key)] = value

    def _setitems(self, _: None) -> None:
        pairs = _pairs(self._since_mark())
        self._last(dict).update(pairs)

    def _pop(self, _: None) -> None:
        self._stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        self._memo[int(index)] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[int(index)])

    _binget = _long_binget = _get

    def _global(self, name: str) -> None:
        name = name.replace(" ", ".", 1)
        if name not in self._names:
            raise _Refusal(f"it names {name}, which would run code; {_ALLOWED}")
        self._stack.append(self._names[name])

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _Refusal(f"it calls a {type(function).__name__}; {_ALLOWED}")
        self._stack.append(function.call(*arguments))

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, (_Dtype, _EmptyArray)):
            raise _Refusal(f"it sets the state of a {type(target).__name__}; {_ALLOWED}")
        target.build(state)
