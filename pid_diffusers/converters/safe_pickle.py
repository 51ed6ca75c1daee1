"""Checkpoints read without unpickling them.

A pickle is a program. Here its opcodes are read by `pickletools`, which runs nothing, and a small interpreter carries
out those that build numbers, text and containers. A name in a pickle is never imported: a few dozen names are known,
each stands for one of the functions below, and any other one ends the reading. Objects become inert records of a
class's name and its attributes. What a file declares must be in the file: no size that it names costs memory before
that many bytes were found.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

SUPPORTED = (
    "pass an EDM pickle with EDMPrecond, a folder with model.safetensors and init_kwargs.json, a state dict of EDM's"
    " code, or one of OpenAI's consistency models"
)
# EDM's largest file needs some 100,000; an empty set costs 216 bytes and one opcode
MAX_OPCODES = 1_000_000
# the pickle in a torch.save archive holds names and shapes alone
MAX_ARCHIVE_PICKLE = 64 * 2**20
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch.save's format before 1.6
_MAGIC_OPCODE = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.uint8,
}
_NUMBERS = {kind + size for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248"), ("b", "1")) for size in sizes}


class UnreadableFile(ValueError):
    """
    Why a file cannot be converted, as the rest of a sentence that begins "source is …, which".

    Args:
        reason (`str`): what is wrong.
        fix (`str`): what to do instead.
    """

    def __init__(self, reason: str, fix: str = SUPPORTED):
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for; nothing was imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a pickle: its class's name and its attributes. It has no behaviour."""

    class_name: str
    state: dict


@dataclass(eq=False)
class Storage:
    """`numel` numbers in a file; `data` are their bytes, once they were read."""

    dtype: torch.dtype
    numel: int
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def flat(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype)


@dataclass(eq=False)
class TensorRecord:
    """A tensor that was not made yet: a view of a storage, known to lie within it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tensor(self) -> torch.Tensor:
        return self.storage.flat.as_strided(self.shape, self.stride, self.offset).contiguous()


@dataclass(eq=False)
class _NumberType:
    """numpy's dtype of a number."""

    code: str
    order: str = "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass(eq=False)
class _EmptyArray:
    """numpy's array between the two opcodes that make and fill it."""

    array: np.ndarray | None = None


class _Stream:
    """A file that is not asked for more than it has: Python takes the memory for a read before it reads."""

    def __init__(self, file, size: int):
        self.file, self.size = file, size
        self.tell, self.readline = file.tell, file.readline

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, max(0, self.size - self.file.tell())))


class _Reader:
    """One file's pickles: what all of them together have used up."""

    def __init__(self, limit: int):
        self.limit = limit  # bytes of the file
        self.opcodes = 0
        self.storage_bytes = 0
        self.nested = False  # whether it reads a storage that is a file of torch.save within a pickle

    def read(self, stream, find_storage: Callable[[tuple], Storage] | None = None):
        """The object of the next pickle in a stream (anything with `read`, `readline` and `tell`)."""
        try:
            return self._run(stream, find_storage)
        except UnreadableFile:
            raise
        except IndexError as error:  # an opcode took more from the stack than was there
            raise UnreadableFile("is damaged: its pickle is not well-formed") from error
        except (ValueError, KeyError, OverflowError, struct.error) as error:  # pickletools; a memo that is not there
            raise UnreadableFile("is no checkpoint, or cut short or damaged: its pickle is not well-formed") from error

    def _run(self, stream, find_storage):
        stack, outer, memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise UnreadableFile(f"has more than {MAX_OPCODES:,} objects, as no checkpoint has")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    stack = outer.pop()
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                    stack.append(argument)
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                    stack.append(argument)
                case "LONG1" | "LONG4":
                    if argument.bit_length() > 128:
                        raise UnreadableFile("holds a number of more than 128 bits, as no checkpoint does")
                    stack.append(argument)
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(set())
                case "TUPLE":
                    items, stack = stack, outer.pop()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(opcode.name[-1])
                    items = [stack.pop() for _ in range(n)]
                    stack.append(tuple(reversed(items)))
                case "APPEND":
                    item = stack.pop()
                    _expect(stack[-1], list).append(item)
                case "APPENDS":
                    items, stack = stack, outer.pop()
                    _expect(stack[-1], list).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _expect(stack[-1], dict)[_key(key)] = value
                case "SETITEMS":
                    items, stack = stack, outer.pop()
                    target = _expect(stack[-1], dict)
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        target[_key(key)] = value
                case "ADDITEMS":
                    items, stack = stack, outer.pop()
                    _expect(stack[-1], set).update(map(_key, items))
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_find(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                    stack.append(_find(module, name))
                case "REDUCE":
                    arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), Global)
                    stack.append(self._call(function, arguments))
                case "NEWOBJ":
                    arguments, kind = _expect(stack.pop(), tuple), _expect(stack.pop(), Global)
                    stack.append(_new(kind, arguments))
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case "BINPERSID":
                    identity = _expect(stack.pop(), tuple)
                    if find_storage is None:
                        raise UnreadableFile("refers to data outside its pickle, as no checkpoint of its kind does")
                    stack.append(find_storage(identity))
                case other:
                    raise UnreadableFile(f"uses the pickle opcode {other}, which no checkpoint needs")

    def _call(self, function: Global, arguments: tuple):
        match (str(function), arguments):
            case ("collections.OrderedDict", ()):
                return {}
            case ("torch_utils.persistence._reconstruct_persistent_obj", (dict() as meta,)):
                name, state = meta.get("class_name"), meta.get("state")
                return Record(_expect(name, str), _expect(state, dict))  # its source code, module_src, stays text
            case ("torch.storage._load_from_bytes", (bytes() as data,)):
                if self.nested:
                    raise UnreadableFile("has storages within storages, as no checkpoint does")
                self.nested = True
                storage = self.read_legacy(io.BytesIO(data), len(data))
                self.nested = False
                return _expect(storage, Storage)
            case ("torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, *_)):
                return _view(storage, offset, shape, stride)
            case ("torch._utils._rebuild_parameter", (TensorRecord() as tensor, *_)):
                return tensor
            case ("numpy.dtype", (str() as code, *_)) if code in _NUMBERS:
                return _NumberType(code)
            case (
                "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar",
                (_NumberType() as kind, bytes() as b),
            ):
                return np.frombuffer(b, kind.dtype).reshape(()).item()
            case (
                "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct",
                (Global("numpy", "ndarray"), (0,), b"b"),
            ):
                return _EmptyArray()
        raise UnreadableFile(f"calls {function} in a way that no checkpoint does")

    def read_legacy(self, stream, size: int):
        """torch.save's format before 1.6: four pickles, then the storages that they name, one after the other."""
        if self.read(stream) != _MAGIC or self.read(stream) != _PROTOCOL:
            raise UnreadableFile("is no checkpoint of torch.save: it does not begin as one")
        if _expect(self.read(stream), dict).get("little_endian") is not True:
            raise UnreadableFile("was written on a big-endian machine", "save it again on another one")
        found: dict[str, Storage] = {}

        def find_storage(identity: tuple) -> Storage:
            key, storage = _storage(identity)
            known = found.setdefault(key, storage)
            if (known.dtype, known.numel) != (storage.dtype, storage.numel):
                raise UnreadableFile("is damaged: it describes one storage in two ways")
            return known

        result = self.read(stream, find_storage)
        keys = _expect(self.read(stream), list)
        # not as text, which would be as deep or as long as what a file nests in its keys
        if not all(type(key) is str for key in keys) or sorted(keys) != sorted(found):
            raise UnreadableFile("is damaged: the storages that it holds are not those that it uses")
        for key in keys:
            storage = found[key]
            count = stream.read(8)
            if len(count) < 8 or struct.unpack("<q", count)[0] != storage.numel:
                raise UnreadableFile("is cut short or damaged: a storage is not as long as it says")
            if storage.nbytes > size - stream.tell():
                raise UnreadableFile("is cut short: it holds fewer bytes than its tensors need")
            self.storage_bytes += storage.nbytes
            if self.storage_bytes > self.limit:
                raise UnreadableFile("is damaged: its storages together are longer than the file")
            storage.data = stream.read(storage.nbytes)
        return result


def read_checkpoint(path: Path):
    """
    What a pickle or a file of torch.save holds; nothing in it is run.

    Args:
        path (`Path`): a pickle (protocol 2 to 5), such as EDM's, or a file of torch.save in either of its formats.

    Returns:
        Numbers, text, lists, tuples, sets and dicts of them; a [`Record`] for each object, a [`TensorRecord`] for each
        tensor. All tensors together are no larger than the file.

    Raises:
        UnreadableFile: if it is anything else.
        OSError: if it cannot be opened.
    """
    size = path.stat().st_size
    if size == 0:
        raise UnreadableFile("is empty")
    with open(path, "rb") as file:
        head = file.read(64)
        reader = _Reader(size)
        if head.startswith(b"PK\x03\x04"):
            return _read_archive(file, size, reader)
        if not head.startswith(b"\x80"):
            raise UnreadableFile("is no checkpoint: neither a pickle nor a file of torch.save")
        file.seek(0)
        stream = _Stream(file, size)
        return reader.read_legacy(stream, size) if head[2:14] == _MAGIC_OPCODE else reader.read(stream)


def tensors(records: dict[str, TensorRecord], limit: int) -> dict[str, torch.Tensor]:
    """
    Float32 tensors of these records.

    Args:
        records (`dict[str, TensorRecord]`): a state dict.
        limit (`int`): how many bytes they may have in the file, its size: many tensors may share one storage.

    Raises:
        UnreadableFile: if they are larger than `limit`, no floating-point numbers, or not finite.
    """
    if sum(record.numel * record.storage.dtype.itemsize for record in records.values()) > limit:
        raise UnreadableFile("declares tensors that are larger than the file")
    result = {}
    for name, record in records.items():
        if not record.storage.dtype.is_floating_point:
            raise UnreadableFile(f"has integers in {shorten(name)}, where weights are floating-point numbers")
        result[name] = record.tensor().to(torch.float32)
        if not bool(result[name].isfinite().all()):
            raise UnreadableFile(f"has values in {shorten(name)} that are not finite")
    return result


def shorten(text: str, length: int = 80) -> str:
    """Text from a file as it may stand in a sentence: printable and at most this long."""
    text = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return text if len(text) <= length else text[: length - 1] + "…"


def _read_archive(file, size: int, reader: _Reader):
    """torch.save's format since 1.6: an archive with one pickle and a file for each storage, none compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries.values()):
                raise UnreadableFile("is a compressed archive, as torch.save writes none")
            if sum(entry.file_size for entry in entries.values()) > size:
                raise UnreadableFile("is an archive whose entries are larger than the file")
            pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UnreadableFile("is an archive, but not of torch.save: it holds no data.pkl")
            if entries[pickles[0]].file_size > MAX_ARCHIVE_PICKLE:
                raise UnreadableFile(f"has a data.pkl of more than {MAX_ARCHIVE_PICKLE:,} bytes, as no checkpoint has")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
                raise UnreadableFile("was written on a big-endian machine", "save it again on another one")
            found: dict[str, Storage] = {}

            def find_storage(identity: tuple) -> Storage:
                key, storage = _storage(identity)
                known = found.get(key)
                if known is None:
                    entry = entries.get(f"{folder}data/{key}")
                    if entry is None or entry.file_size != storage.nbytes:
                        raise UnreadableFile("is damaged: a storage is missing or not as long as it says")
                    storage.data = archive.read(entry)
                    known = found[key] = storage
                if (known.dtype, known.numel) != (storage.dtype, storage.numel):
                    raise UnreadableFile("is damaged: it describes one storage in two ways")
                return known

            return reader.read(io.BytesIO(archive.read(pickles[0])), find_storage)
    except UnreadableFile:
        raise
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
        struct.error,
    ) as error:
        # RuntimeError: an entry that says that it is encrypted; OSError: one that says that it begins before the file
        raise UnreadableFile("is an archive that is cut short or damaged") from error


def _storage(identity: tuple) -> tuple[str, Storage]:
    """The storage that a persistent id of torch.save describes, and its key."""
    match identity:
        case ("storage", Global("torch", kind), str() as key, str(), int() as numel, *view) if kind in _STORAGES:
            if numel >= 0 and view in ([], [None]):
                return key, Storage(_STORAGES[kind], numel)
    raise UnreadableFile("describes a storage as torch.save does not")


def _view(storage: Storage, offset, shape, stride) -> TensorRecord:
    numbers = (offset, *_expect(shape, tuple), *_expect(stride, tuple))
    if len(shape) != len(stride) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise UnreadableFile("is damaged: the shape of a tensor is no shape")
    record = TensorRecord(storage, offset, shape, stride)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if not 0 < record.numel <= storage.numel or last >= storage.numel:
        raise UnreadableFile("is damaged: a tensor is empty or larger than its storage")
    return record


def _expect(value, kind: type):
    if type(value) is not kind:
        raise UnreadableFile(f"is damaged or no checkpoint: its pickle has a {type(value).__name__} out of place")
    return value


def _key(key):
    # The hash of nested tuples calls itself once a level, without a limit.
    if not isinstance(key, str | int | float | bytes | None):
        raise UnreadableFile(f"has a {type(key).__name__} as the key of a dict, as no checkpoint has")
    return key


_FUNCTIONS = {
    "collections": ("OrderedDict",),
    "torch_utils.persistence": ("_reconstruct_persistent_obj",),
    "torch.storage": ("_load_from_bytes",),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch": tuple(_STORAGES),
    "torch.nn.modules.container": ("ModuleDict", "ModuleList", "Sequential"),
    "dnnlib.util": ("EasyDict",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
}


def _find(module: str, name: str) -> Global:
    if name not in _FUNCTIONS.get(module, ()):
        raise UnreadableFile(
            f"asks for {shorten(f'{module}.{name}')}, which is no part of a checkpoint that can be read safely"
        )
    return Global(module, name)


def _new(kind: Global, arguments: tuple):
    if arguments == ():
        if kind.module == "torch.nn.modules.container":
            return Record(kind.name, {})
        if kind.module == "dnnlib.util":
            return {}
    raise UnreadableFile(f"makes a {kind} in a way that no checkpoint does")


def _build(target, state):
    match (target, state):
        case (Record(), dict()):
            target.state.update(state)
        case (dict(), dict() | None):
            pass  # the attributes of an OrderedDict: a state dict's version
        case (_NumberType(), (int(), "<" | ">" | "=" | "|" as order, *_)):
            target.order = order
        case (_EmptyArray(), (int(), tuple() as shape, _NumberType() as kind, bool() as fortran, bytes() as data)):
            if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
                raise UnreadableFile("is damaged: the shape of an array is no shape")
            if math.prod(shape) * kind.dtype.itemsize != len(data):
                raise UnreadableFile("is damaged: an array is not as large as it says")
            target.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
        case _:
            raise UnreadableFile("is damaged or no checkpoint: it gives attributes to what has none")
