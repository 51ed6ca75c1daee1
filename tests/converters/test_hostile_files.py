"""Files that try to run code, take memory or pass for checkpoints: each gets one sentence and leaves no trace."""

import builtins
import collections
import copyreg
import importlib
import io
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pid_diffusers import InputError
from pid_diffusers.converters import convert, safe_pickle
from pid_diffusers.converters.safe_pickle import MAX_OPCODES, TensorRecord, read_checkpoint

MARKER = "MARKER"  # in every hostile file: a relative path that its code would create
TOUCH = f"open({MARKER!r}, 'w').close()"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def opcodes(text: str, *arguments: bytes) -> bytes:
    """A pickle of protocol 4 from its opcodes, `{}` standing for the arguments in turn."""
    parts = text.encode("latin-1").split(b"{}")
    body = parts[0]
    for argument, part in zip(arguments, parts[1:], strict=True):
        body += argument + part
    return b"\x80\x04" + body


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def with_storage(payload: bytes) -> bytes:
    """A tensor as a plain pickle has it, with these bytes where its storage's own file should be."""
    return opcodes(
        "{}B{}{}\x85R.", name("torch.storage", "_load_from_bytes"), struct.pack("<I", len(payload)), payload
    )


def legacy_storage(numel: int, data: bytes, key: str = "0") -> bytes:
    """A storage by torch.save before 1.6, that says it has `numel` numbers."""
    stream = io.BytesIO()
    for each in (safe_pickle._MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(each, stream, protocol=2)
    identity = pickle.dumps(("storage", "TYPE", key, "cpu", numel, None), protocol=2)
    stream.write(identity.replace(b"X\x04\x00\x00\x00TYPE", name("torch", "FloatStorage"))[:-1] + b"Q.")
    pickle.dump([key], stream, protocol=2)
    stream.write(struct.pack("<q", numel) + data)
    return stream.getvalue()


def tensor_pickle(offset: int, shape: tuple, stride: tuple, numel: int = 4) -> bytes:
    """A state dict of one tensor that says it has this shape."""
    storage = with_storage(legacy_storage(numel, bytes(16)))[2:-1]
    items = b"".join(pickle.dumps(item, protocol=2)[2:-1] for item in (offset, shape, stride, False, {}))
    head = b"\x80\x04}X\x01\x00\x00\x00w" + name("torch._utils", "_rebuild_tensor_v2") + b"("
    return head + storage + items + b"tRs."


def archive(data: bytes, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for key, content in (entries or {}).items():
            file.writestr(f"archive/{key}", content)
    return stream.getvalue()


def saved(content, **kwargs) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **kwargs)
    return stream.getvalue()


def deep(opening: bytes, closing: bytes, depth: int = 200_000) -> bytes:
    return b"\x80\x04" + opening + closing * depth + b"."


def calls() -> dict[str, bytes]:
    """Each runs code where it is unpickled."""
    shell = f"touch {MARKER}"
    result = {
        "os.system": pickle.dumps(Call(os.system, shell)),
        "protocol 0": pickle.dumps(Call(os.system, shell), protocol=0),
        "protocol 2": pickle.dumps(Call(os.system, shell), protocol=2),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", MARKER])),
        "eval": pickle.dumps(Call(eval, TOUCH)),
        "exec": pickle.dumps(Call(exec, TOUCH)),
        "import": pickle.dumps(Call(__import__, "this")),
        "nested reduce": pickle.dumps({"ema": Call(dict, [("a", Call(list, [Call(eval, TOUCH)]))])}),
        "in a key": pickle.dumps({Call(eval, TOUCH): 1}),
        "copyreg": pickle.dumps(Call(copyreg._reconstructor, subprocess.Popen, object, None, state={"a": 1})),
        "new object": opcodes("{}]\x8c\x05toucha\x8c\x06MARKERa\x85\x81.", name("subprocess", "Popen")),
        "set state": pickle.dumps(Call(collections.OrderedDict, state={"__class__": subprocess.Popen})),
        "ordered dict of a call": pickle.dumps(Call(collections.OrderedDict, Call(eval, TOUCH))),
        "inst": b"(S'touch MARKER'\nios\nsystem\n.",
        "obj": opcodes("({}\x8c\x0ctouch MARKERo.", name("os", "system")),
        "extension": opcodes("\x82\x01."),
        "dotted name": opcodes("\x8c\x05torch\x8c\x0bos.path.abs\x93."),
        "dotted known name": opcodes("\x8c\x0btorch._utils\x8c\x1b_rebuild_tensor_v2.__call__\x93."),
        "torch.load in a storage": with_storage(pickle.dumps(Call(os.system, shell))),
        "torch.save in a storage": with_storage(saved({"a": Call(eval, TOUCH)})),
        "old torch.save in a storage": with_storage(saved([Call(eval, TOUCH)], _use_new_zipfile_serialization=False)),
        "torch.save": saved({"time_embed.0.weight": Call(eval, TOUCH)}),
        "old torch.save": saved({"time_embed.0.weight": Call(eval, TOUCH)}, _use_new_zipfile_serialization=False),
        "persistent id": opcodes("{}\x8c\x0ctouch MARKER\x85RQ.", name("os", "system")),
        "numpy array of a class": pickle.dumps(Call(np.zeros(1).__reduce__()[0], subprocess.Popen, (0,), b"b")),
        "numpy array of objects": pickle.dumps(np.array([Call(eval, TOUCH)], dtype=object)),
        "numpy scalar of objects": pickle.dumps(Call(np.float64(1).__reduce__()[0], np.dtype("O"), Call(eval, TOUCH))),
        "a class is called": opcodes("{})R}\x8c\x01ab.", name("torch.nn.modules.container", "ModuleDict")),
        "a class is changed": opcodes("{}}\x8c\x05forwardNsb.", name("torch.nn.modules.container", "ModuleDict")),
        "a function is changed": opcodes("{}N}\x8c\x04codeNs\x86b.", name("torch._utils", "_rebuild_tensor_v2")),
        "a number is called": opcodes("K\x01)R."),
        "text is called": opcodes("\x8c\x06system\x8c\x01a\x85R."),
    }
    module = name("importlib", "import_module") + b"\x8c\x02os\x85R"
    result["getattr"] = opcodes(
        "{}{}\x8c\x06system\x86R\x8c\x0ctouch MARKER\x85R.", name("builtins", "getattr"), module
    )
    result["builtins"] = pickle.dumps(builtins.getattr)
    return result


def bombs() -> dict[str, bytes]:
    """Each declares or makes more than it holds."""
    huge = 2**40
    result = {
        "bytes": opcodes("\x8e{}abc.", struct.pack("<Q", huge)),
        "text": opcodes("\x8d{}abc.", struct.pack("<Q", huge)),
        "bytearray": opcodes("\x96{}abc.", struct.pack("<Q", huge)),
        "frame": opcodes("\x95{}N.", struct.pack("<Q", huge)),
        "number": opcodes("\x8b{}abc.", struct.pack("<i", 2**31 - 1)),
        "long number": opcodes("\x8b{}{}.", struct.pack("<i", 10**6), b"\x7f" * 10**6),
        "memo index": opcodes("Nr{}N.", struct.pack("<I", 2**32 - 1)) + b"",
        "memo bomb": b"\x80\x04]\x94"
        + b"".join(b"](h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"e\x94" for i in range(99))
        + b".",
        "empty sets": b"\x80\x04(" + b"\x8f" * (MAX_OPCODES + 1) + b"t.",
        "deep tuples": deep(b")", b"\x85"),
        "deep lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
        "deep set": b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
        "list in itself": opcodes("]\x94h\x00a."),
        "storage": with_storage(legacy_storage(huge, bytes(16))),
        "file of torch.save": legacy_storage(huge, bytes(16)),
        "tensor": tensor_pickle(0, (huge,), (1,)),
        "tensor of stride 0": tensor_pickle(0, (2**20, 2**20), (0, 0)),
        "tensor behind its storage": tensor_pickle(huge, (1,), (1,)),
        "negative tensor": tensor_pickle(-4, (2,), (1,)),
        "empty tensor": tensor_pickle(0, (0, 2**60), (1, 1)),
        "numpy shape": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
        "zip bomb": archive(b"\x80\x02" + b"N0" * 10**6 + b".", compression=zipfile.ZIP_DEFLATED),
        "zip bomb of weights": archive(pickle.dumps({}), {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED),
    }
    zipped = saved({"w": torch.ones(4)})
    result["storage in an archive"] = zipped.replace(b"K\x04t", b"K\xfft")
    result["storage that is not there"] = zipped.replace(b"archive/data/0", b"archive/data/7")
    return result


def texts() -> dict[str, bytes]:
    """Each is something else."""
    return {
        "empty": b"",
        "text": b"It is a truth universally acknowledged",
        "page": b"<!DOCTYPE html><title>404</title>",
        "one byte": b"\x80",
        "stop": b"\x80\x04.",
        "number": pickle.dumps(3),
        "nothing": pickle.dumps({}),
        "ema of text": pickle.dumps({"ema": "a"}),
        "zeros": bytes(1000),
        "archive of text": archive(b"text"),
        "archive without a pickle": archive(b"").replace(b"data.pkl", b"data.txt"),
        "head of an archive": saved({"w": torch.ones(4)})[:100],
        "odd names": opcodes("{}.", name("\x1b[31m", "x" * 10**5)),
        "module graph that is no tree": opcodes("\x8c\x01a."),
    }


@pytest.fixture
def unharmed(tmp_path, monkeypatch):
    """Fails if a file that is read meanwhile leaves a trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # which changes between here and the end
    importlib.import_module("pid_diffusers.model_cards")  # where the templates of cards are
    "".encode("cp437")  # by which the names in an archive are read: Python imports it once
    modules, environment = set(sys.modules), dict(os.environ)
    names = set(vars(safe_pickle)) | set(vars(builtins))
    yield
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    assert not Path(MARKER).exists()
    assert set(sys.modules) == modules
    assert dict(os.environ) == environment
    assert set(vars(safe_pickle)) | set(vars(builtins)) == names


def refuse(content: bytes, sentence: str | None = None):
    Path("hostile.pt").write_bytes(content)
    with pytest.raises(InputError, match=sentence) as error:
        convert("hostile.pt", "out")
    said = str(error.value)
    assert said.startswith("source is 'hostile.pt', which ") and said.endswith(".") and len(said) < 500
    assert said.isprintable()
    assert os.listdir() == ["hostile.pt"]


@pytest.mark.parametrize("kind", calls())
def test_no_code_is_run(kind, unharmed):
    refuse(calls()[kind])


def test_the_corpus_is_hostile(tmp_path):
    # A file that is refused for a slip in this test would prove nothing: Python and torch run the code of these.
    harmful = ["os.system", "protocol 0", "protocol 2", "subprocess", "eval", "exec", "nested reduce", "in a key"]
    harmful += ["ordered dict of a call", "inst", "obj", "getattr", "torch.save", "old torch.save"]
    harmful += ["torch.load in a storage", "torch.save in a storage", "old torch.save in a storage"]
    for kind in harmful:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "hostile").write_bytes(calls()[kind])
    script = """
import os, pickle, sys, torch
for kind in sys.argv[1:]:
    os.chdir(os.path.join(sys.path[0] or ".", kind))
    for load in (lambda: pickle.load(open("hostile", "rb")), lambda: torch.load("hostile", weights_only=False)):
        try:
            load()
        except Exception:
            pass
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "script.py"), *harmful], capture_output=True, timeout=120)
    assert [kind for kind in harmful if not (tmp_path / kind / MARKER).exists()] == []


@pytest.mark.parametrize("kind", bombs())
def test_what_is_declared_costs_no_memory(kind, unharmed):
    Path("hostile.pt").write_bytes(bombs()[kind])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, limits[1]))  # an opcode may cost an empty set
    try:
        refuse(bombs()[kind])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("kind", texts())
def test_what_is_no_checkpoint_is_said_to_be_none(kind, unharmed):
    refuse(texts()[kind])


def test_folders_and_paths_that_are_not_there_are_refused(unharmed):
    for source, sentence in [
        ("missing.pkl", "does not exist; pass a file or a folder"),
        (".", "is a folder without model.safetensors"),
        ("a\0b", "does not exist"),
        ("a" * 300, "cannot be read"),
        (os.devnull, "is neither a file nor a folder"),
    ]:
        with pytest.raises(InputError, match=sentence):
            convert(source, "out")


def test_the_source_code_in_a_pickle_is_not_run(tmp_path, unharmed, write_edm_pickle):
    write_edm_pickle(tmp_path / "edm.pkl", source=f"{TOUCH}\nimport this\nclass EDMPrecond: pass\n")
    assert TOUCH.encode() in (tmp_path / "edm.pkl").read_bytes()
    modules = set(sys.modules)
    assert convert("edm.pkl", "out").parameters == 374_979
    assert set(sys.modules) == modules and "this" not in modules


def test_modules_that_are_no_tree_are_refused(unharmed):
    module = opcodes("{}", name("torch.nn.modules.container", "ModuleDict"))[2:] + b")\x81"
    persistent = name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}"

    def attribute(key: str, value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(key)) + key.encode() + value + b"s"

    def record(class_name: str, state: bytes) -> bytes:
        text = b"X" + struct.pack("<I", len(class_name)) + class_name.encode()
        return persistent + attribute("class_name", text) + attribute("state", b"}" + state) + b"\x85R"

    kwargs = pickle.dumps({"model_type": "SongUNet", "img_resolution": 8, "img_channels": 3}, protocol=2)[2:-1]
    # a module that is its own child, and one that is two modules' child
    loop = module + b"q\x01}" + attribute("_modules", b"}" + attribute("a", b"h\x01")) + b"b"
    twice = (
        module
        + b"q\x01}"
        + attribute("_modules", b"}" + attribute("a", module + b"q\x02") + attribute("b", b"h\x02"))
        + b"b"
    )
    for inner in (loop, twice):
        network = record("SongUNet", attribute("_modules", b"}" + attribute("enc", inner)))
        state = attribute("_init_kwargs", kwargs) + attribute("_modules", b"}" + attribute("model", network))
        refuse(b"\x80\x04}" + attribute("ema", record("EDMPrecond", state)) + b".", "modules are no tree")


def test_one_storage_for_many_tensors_is_not_multiplied(unharmed):
    weights = {f"enc.{i}": torch.ones(1) for i in range(100)}
    flat = torch.ones(10_000)
    weights = dict.fromkeys(["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"], flat)
    weights |= {f"a{i}": flat.view(100, 100) for i in range(100)}
    Path("hostile.pt").write_bytes(saved(weights))
    records = read_checkpoint(Path("hostile.pt"))
    assert all(isinstance(record, TensorRecord) for record in records.values())
    with pytest.raises(ValueError, match="larger than the file"):
        safe_pickle.tensors(records, Path("hostile.pt").stat().st_size)


def damaged_sources(tmp_path: Path, write_edm_pickle, edm_network) -> dict[str, bytes]:
    _, weights = edm_network("ddpmpp_cond")
    return {
        "edm.pkl": write_edm_pickle(tmp_path / "edm.pkl").read_bytes(),
        "edm.pt": saved(weights),
        "old.pt": saved(weights, _use_new_zipfile_serialization=False),
    }


@pytest.mark.parametrize("kind", [pytest.param("edm.pkl", marks=pytest.mark.slow), "edm.pt", "old.pt"])
def test_truncated_files_are_refused(kind, tmp_path, unharmed, write_edm_pickle, edm_network):
    content = damaged_sources(tmp_path, write_edm_pickle, edm_network)[kind]
    (tmp_path / "edm.pkl").unlink()
    generator = random.Random(0)
    for length in [1, 2, 3, 10, 100, len(content) - 1, *(generator.randrange(len(content)) for _ in range(20))]:
        refuse(content[:length])


@pytest.mark.parametrize("kind", ["edm.pkl", "edm.pt", "old.pt"])
def test_flipped_bits_are_refused_or_change_a_weight(kind, tmp_path, unharmed, write_edm_pickle, edm_network):
    content = damaged_sources(tmp_path, write_edm_pickle, edm_network)[kind]
    generator, refused = random.Random(0), 0
    structure = structural_bytes(kind, content)
    for round in range(150):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 3])):
            # most of a file is weights, in which no pickle has a checksum; aim at the rest
            place = generator.choice(structure) if round % 3 else generator.randrange(len(content))
            damaged[place] ^= 1 << generator.randrange(8)
        Path("damaged").write_bytes(damaged)
        try:
            convert("damaged", "out")
            shutil.rmtree("out")
        except InputError as error:
            refused += 1
            assert str(error).isprintable()
        assert not Path("out").exists() and not list(Path().glob(".*"))
    assert refused > 20


def structural_bytes(kind: str, content: bytes) -> list[int]:
    """Where in a file something else than weights is."""
    if kind == "edm.pt":
        return [*range(3000), *range(len(content) - 8000, len(content))]
    found = [i for word in (b"Storage", b"class_name", b"_rebuild", b"state") for i in places(content, word)]
    return [max(0, i + j) for i in found for j in range(-40, 40)]


def places(content: bytes, word: bytes) -> list[int]:
    found, at = [], content.find(word)
    while at >= 0:
        found.append(at)
        at = content.find(word, at + 1)
    return found[:2000]


def test_checkpoints_are_read_as_unpickling_would(tmp_path):
    tensors = {
        "a": torch.arange(12.0).reshape(3, 4).T,
        "b": torch.tensor(3.0),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    plain = {"x": [1, -1, 2**40, 1.5, None, True, "é", b"b"], "y": (1, (2,), (1, 2, 3, 4)), "z": {1, 2}}
    for protocol in (2, 3, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({**plain, "z": {}, "n": np.float64(2.5)}, protocol))
        if protocol > 2:  # protocol 2 has no bytes
            assert read_checkpoint(tmp_path / "a.pkl") == {**plain, "z": {}, "n": 2.5}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(plain))
    assert read_checkpoint(tmp_path / "a.pkl") == plain
    for content in (pickle.dumps(tensors), saved(tensors), saved(tensors, _use_new_zipfile_serialization=False)):
        (tmp_path / "a.pt").write_bytes(content)
        result = read_checkpoint(tmp_path / "a.pt")
        assert all(torch.equal(result[key].tensor(), tensors[key]) for key in tensors)
    array = np.arange(6.0).reshape(2, 3)
    for each in (array, np.asfortranarray(array), array.astype(">f4"), array.astype("i2")):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(each, protocol=4))
        result = read_checkpoint(tmp_path / "a.pkl").array
        assert np.array_equal(result, each) and result.dtype == each.dtype


def legacy_with_keys(keys) -> bytes:
    """torch.save's old format around an empty state dict, with a list of storages that says `keys`."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, keys]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def nested(levels: int, branches: int = 1):
    value = []
    for _ in range(levels):
        value = [value] * branches
    return value


@pytest.mark.parametrize("keys", [[0], nested(400), nested(60, 2)], ids=["numbers", "deep", "billion laughs"])
def test_storage_keys_that_are_no_names_are_refused_at_once(unharmed, keys):
    refuse(legacy_with_keys(keys), "is damaged")


def test_storages_within_storages_are_refused(unharmed):
    class Inner:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return torch.storage._load_from_bytes, (self.data,)

    payload = b""
    for _ in range(4):
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Inner(payload), []]
        payload = b"".join(pickle.dumps(part, protocol=4 if part is parts[3] else 2) for part in parts)
    refuse(payload, "storages within storages")


def test_a_storage_that_is_read_again_and_again_is_refused(unharmed):
    buffer = io.BytesIO()
    torch.save(torch.zeros(10_000).untyped_storage(), buffer, _use_new_zipfile_serialization=False)

    class Copies:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (data,)

    data = buffer.getvalue()
    refuse(pickle.dumps([Copies() for _ in range(200)], protocol=2))
