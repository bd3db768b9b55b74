"""Saved folders with something wrong: `python tests/mutated_folders.py --count 1000 --start 0`.

Each seed changes a folder that `depgraph.save` wrote: bytes, files, text and fields of plan.json, tensors, what both say; half of the changed
plan.json get a fitting checksum, as somebody would who wants the folder to be believed. Loading must end within seconds
and within a bound of memory, with an error of depgraph's, or with the very model that was saved; a folder whose
checksums were made to fit may also give another model, as one may save whatever one likes. Each load runs in a process
of its own. Prints a table and every seed that went wrong; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import depgraph
from depgraph.store.document import _first_line

SECONDS = 60  # of wall time, on a busy machine
BYTES = 1 << 30  # that a load may take, on top of what the process has


@dataclass
class Config:
    width: int = 14
    classes: int = 5


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 132)


class Network(nn.Module):
    """A bit of everything that a folder has: ties, blocks, literals, buffers, tables, extra state, a config."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.first = nn.Conv2d(3, config.width, 3, padding=1)
        self.norm = nn.BatchNorm2d(config.width)
        self.grouped = nn.Conv2d(config.width, 22, 1, groups=2)
        self.flat = Flat()
        self.inner = nn.Linear(22 * 6, 13)
        self.one, self.two = nn.Linear(13, 13), nn.Linear(13, 13)
        self.two.weight = self.one.weight
        self.last = nn.Linear(13, config.classes)
        self.register_buffer("scale", torch.linspace(1, 2, config.width), persistent=False)
        self.table = torch.linspace(0, 1, 13)
        self.steps = 7

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)) * self.scale[:, None, None]
        x = self.flat(self.grouped(x.relu()))
        x = self.inner(x).relu() + self.table
        return self.last(self.two(self.one(x).relu()))

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def factory() -> Network:
    return Network(Config())


def inputs() -> Tensor:
    return torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(3))


def saved(folder: Path) -> nn.Module:
    """Save a network that was pruned twice, in shards; return it."""
    torch.manual_seed(11)
    model = factory().eval()
    once = depgraph.prune(model, inputs(), pruning_ratio=0.3).model
    twice = depgraph.prune(once, inputs(), pruning_ratio=0.3)
    twice.model.first.to(memory_format=torch.channels_last)
    depgraph.save(twice, folder, max_shard_bytes=1500)
    return twice.model


def state(model: nn.Module) -> dict[str, Any]:
    """All that must be the same: tensors with what they are, modes, numbers of modules, and what the model computes."""
    tensors: dict[str, Any] = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        "table": model.table,
    }
    found = {
        n: (t.dtype, tuple(t.shape), t.stride(), t.requires_grad, t.detach().tolist())
        for n, t in tensors.items()
    }
    modules = {
        n: (m.training, {k: v for k, v in vars(m).items() if type(v) in (int, float, bool, tuple)})
        for n, m in model.named_modules()
    }
    model.eval()
    return {**found, "modules": modules, "output": model(inputs()).tolist(), "config": vars(model.config)}


# ------------------------------------------------------------------------------------------------ mutations

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**40, 1.5, 1e308, "", "x", "../../etc/passwd", "/dev/zero", "\ud800",
    "model.safetensors", "F32", "float32", "__class__", "_modules", "forward", "first.weight", [], {}, [[]], [0], [1, 0], [-1],
    [2**40, 2**40], {"a": 1}, {"__reduce__": "os.system"}, "a" * 5000, [[[[[[[[]]]]]]]],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for k in keys for p in places(value[k], (*path, k))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def in_bytes(folder: Path, dice: random.Random) -> str:
    path = dice.choice(files(folder))
    data = bytearray(path.read_bytes())
    i = dice.randrange(len(data)) if dice.random() < 0.7 else min(dice.randrange(200), len(data) - 1)
    kind = dice.choice(["flip", "flip", "set", "insert", "delete", "truncate", "zeros", "append"])
    if kind == "flip":
        data[i] ^= 1 << dice.randrange(8)
    elif kind == "set":
        data[i] = dice.randrange(256)
    elif kind == "insert":
        data[i:i] = dice.randbytes(dice.randint(1, 9))
    elif kind == "delete":
        del data[i : i + dice.randint(1, 9)]
    elif kind == "truncate":
        del data[i:]
    elif kind == "zeros":
        data[i : i + 16] = bytes(len(data[i : i + 16]))
    else:
        data += dice.randbytes(dice.randint(1, 99))
    path.write_bytes(data)
    return f"bytes: {kind}"


def in_fields(folder: Path, dice: random.Random) -> str:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    data.pop("sha256")
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        options = places(data)
        spot = dice.choice([p for p in options if len(p) <= dice.choice([1, 2, 3, 9])])
        holder, key = at(data, spot[:-1]), spot[-1]
        kind = dice.choice(["nasty", "nasty", "other", "remove", "rename", "near"])
        if kind == "nasty":
            holder[key] = dice.choice(NASTY)
        elif kind == "other":
            holder[key] = json.loads(json.dumps(at(data, dice.choice(options))))
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[dice.choice([n for n in NASTY if isinstance(n, str)])] = holder.pop(key)
        elif kind == "near" and type(holder[key]) is int:
            holder[key] += dice.choice([-1, 1, 2**20])
        else:
            holder[key] = [holder[key]]
    signed = dice.random() < 0.5
    write_plan(path, data, signed)
    return "fields, signed" if signed else "fields"


def write_plan(path: Path, data: Any, signed: bool) -> None:
    rest = json.dumps(data)[1:]
    line = _first_line(rest) if signed else path.read_text().partition("\n")[0]
    path.write_text(f"{line}\n{rest}\n")


def in_tensors(folder: Path, dice: random.Random) -> str:
    path = dice.choice([p for p in files(folder) if p.suffix == ".safetensors"])
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    kind = dice.choice(["missing", "extra", "shape", "dtype", "values", "swap", "nan", "empty", "more"])
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors[dice.choice(["extra", "first.bias2", "../x"])] = torch.zeros(2)
    elif kind == "shape":
        tensors[name] = tensors[name].reshape(-1, 1).clone()
    elif kind == "dtype":
        tensors[name] = tensors[name].to(
            dice.choice([torch.int32, torch.float64, torch.bool, torch.bfloat16])
        )
    elif kind == "values":
        tensors[name] = tensors[name] * 0 + 1.25
    elif kind == "swap":
        names = sorted(tensors)
        tensors = dict(zip(names, [tensors[n] for n in names[1:] + names[:1]], strict=True))
    elif kind == "nan":
        tensors[name] = (
            torch.full_like(tensors[name], float("nan"))
            if tensors[name].is_floating_point()
            else tensors[name] + 1
        )
    elif kind == "empty":
        tensors[name] = torch.zeros(0)
    else:
        tensors[name] = torch.cat([tensors[name].reshape(-1)] * 2)
    save_file(tensors, path)
    return f"tensors: {kind}"


def in_header(folder: Path, dice: random.Random) -> str:
    """The header of a weight file: shapes, places that overlap or lie outside, its own length."""
    path = dice.choice([p for p in files(folder) if p.suffix == ".safetensors"])
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = dice.choice([n for n in header if n != "__metadata__"])
    kind = dice.choice(["length", "huge", "overlap", "outside", "negative", "nasty"])
    if kind == "huge":
        header[name]["shape"] = dice.choice([[2**62, 2**62], [2**40], [2**63 - 1], [10**30]])
    elif kind == "overlap":
        header[name]["data_offsets"] = dice.choice([h for n, h in header.items() if n != "__metadata__"])[
            "data_offsets"
        ]
    elif kind == "outside":
        header[name]["data_offsets"][1] += dice.choice([1, 4, 2**33, 2**63])
    elif kind == "negative":
        header[name]["data_offsets"][0] -= 4
    elif kind == "nasty":
        spot = dice.choice(places(header))
        at(header, spot[:-1])[spot[-1]] = dice.choice(NASTY)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = dice.choice([0, 1, 2**63, 2**64 - 1, len(text) + 8]) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + rest)
    return f"header: {kind}"


def in_files(folder: Path, dice: random.Random) -> str:
    path = dice.choice(files(folder))
    kind = dice.choice(["gone", "link", "link out", "folder", "pipe", "empty", "swapped", "sparse", "names"])
    data = path.read_bytes()
    if kind == "swapped":
        other = dice.choice(files(folder))
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return "files: swapped"
    if kind == "names":
        plan = folder / "plan.json"
        text = json.loads(plan.read_text())
        text.pop("sha256")
        name = dice.choice(list(text["tensors"]))
        text["tensors"][name]["file"] = dice.choice(["../model.safetensors", "/etc/passwd", "model-00001-of-00001.safetensors\n", "other.safetensors"])  # fmt: skip
        write_plan(plan, text, signed=True)
        return "files: names"
    path.unlink()
    if kind in ("link", "link out"):
        target = folder.parent / "outside" if kind == "link out" else folder / "elsewhere"
        target.write_bytes(data)
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "sparse":
        path.write_bytes(data)
        os.truncate(path, 1 << 42)
    return f"files: {kind}"


def in_shapes(folder: Path, dice: random.Random) -> str:
    """plan.json and header agree on a shape that the model has not."""
    plan = folder / "plan.json"
    text = json.loads(plan.read_text())
    text.pop("sha256")
    name = dice.choice(list(text["tensors"]))
    row = text["tensors"][name]
    path = folder / row["file"]
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    kept = {n: h for n, h in header.items() if n not in (name, "__metadata__")}
    offset, rest = 0, b""
    for entry in kept.values():
        begin, end = entry["data_offsets"]
        rest += data[8 + size + begin : 8 + size + end]
        entry["data_offsets"] = [offset, offset + end - begin]
        offset += end - begin
    huge = 1 << 38  # zeros that take no room on the disk
    row["shape"] = [huge // 4]
    row["dtype"] = "float32"
    row.pop("stride", None)
    kept[name] = {"dtype": "F32", "shape": [huge // 4], "data_offsets": [offset, offset + huge]}
    head = json.dumps(kept).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + rest)
    os.truncate(path, 8 + len(head) + offset + huge)
    if dice.random() < 0.5:
        for one in text["plans"]:
            for known in one["shapes"]:
                if known == name:
                    one["shapes"][known] = [huge // 4]
    write_plan(plan, text, signed=True)
    return "shapes: huge"


def in_text(folder: Path, dice: random.Random) -> str:
    """What JSON text can say and data can't: fields twice, numbers that are none, depth, size, other encodings."""
    path = folder / "plan.json"
    first, _, rest = path.read_text().partition("\n")
    spots = [m.start() for m in re.finditer(r"(?<=[\[ ])\d+(?=[,\]}])", rest)]
    spot = dice.choice(spots)
    end = spot + len(re.match(r"\d+", rest[spot:])[0])  # type: ignore[index]
    words = [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "1.0",
        "true",
        "9" * 5000,
        "0x10",
        "1_0",
        "[" * 200000,
    ]
    text, encoding = rest, "utf-8"
    kind = dice.choice(["twice", "number", "number", "dims", "deep", "version", "encoding", "more"])
    if kind == "twice":
        name = dice.choice(["format", "plans", "tensors", "ties", "shapes", "cuts", "config", "first.weight"])
        text = re.sub(rf'"{re.escape(name)}": ', lambda m: f'"{name}": {dice.choice(["1", "{}", "[]"])}, {m[0]}', rest, count=1)  # fmt: skip
    elif kind == "number":
        text = rest[:spot] + dice.choice(words) + rest[end:]
    elif kind == "dims":
        text = re.sub(
            r'("(?:first|last)\.weight": )\[', lambda m: f"{m[1]}[{f'{2**62}, ' * 200000}", rest, count=1
        )
    elif kind == "deep":
        depth = dice.choice([500, 5000, 500000])
        text = rest.replace('"provenance": {', '"provenance": {"x": ' + '{"x": ' * depth + "1" + "}" * depth + ", ", 1)  # fmt: skip
    elif kind == "version":
        text = re.sub(
            r'"format": \d+',
            f'"format": {dice.choice(["0", "2", "3", "null", "[]", "9" * 30, "1.5"])}',
            rest,
            count=dice.randint(1, 2),
        )
    elif kind == "more":
        text = rest + dice.choice(["{}", "}", "\n\n{}", "\x00", ","])
    else:
        encoding = dice.choice(["utf-16", "utf-8-sig", "utf-32"])
    signed = dice.random() < 0.7
    path.write_bytes(f"{_first_line(text) if signed else first}\n{text}\n".encode(encoding))
    return "text, signed" if signed else "text"


def in_meaning(folder: Path, dice: random.Random) -> str:
    """plan.json and the files agree with each other, and not with the model: ties, views, types, flags, places."""
    plan = folder / "plan.json"
    data = json.loads(plan.read_text())
    data.pop("sha256")
    names = sorted(data["tensors"])
    one, two = dice.choice(names), dice.choice(names)
    kind = dice.choice(["tie", "tie", "untie", "view", "type", "plans", "held", "modes", "stride"])
    if kind == "tie":
        data["ties"] = {dice.choice([*data["ties"], one, "two.weight"]): two}
    elif kind == "untie":
        name, first = data["ties"].popitem()
        data["tensors"][name] = data["tensors"][first]
    elif kind == "view":
        data["views"] = {dice.choice(["two.weight", "new", one]): two}
        if dice.random() < 0.5:
            data["ties"] = {}
    elif kind == "type":
        other = retyped(folder, data["tensors"][one], one, dice)
        data["tensors"][one]["dtype"] = other
    elif kind == "plans":
        data["plans"] = dice.choice([[], data["plans"][:1], data["plans"][::-1], data["plans"] * 2])
    elif kind == "held":
        data["held"][one] = [
            ["", [dice.choice(["table", "steps", "config", "forward", "_modules", "training"])]]
        ]
    elif kind == "modes":
        data["training"], data["frozen"] = [dice.choice(["", "first", "nowhere"])], [one]
    else:
        row = data["tensors"][one]
        row["stride"] = dice.choice(
            [row["shape"][::-1], [0] * len(row["shape"]), [1] * len(row["shape"]), [2**62]]
        )
    write_plan(plan, data, signed=True)
    return f"meaning: {kind}, signed"


def retyped(folder: Path, row: dict[str, Any], name: str, dice: random.Random) -> str:
    """Let a file say another type of the same size for one tensor; the name that we have for it."""
    same = [("F32", "float32"), ("I32", "int32"), ("U32", "uint32")], [("I64", "int64"), ("F64", "float64"), ("U64", "uint64")]  # fmt: skip
    code, ours = dice.choice(same[0] if row["dtype"] == "float32" else same[1])
    path = folder / row["file"]
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = code
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return ours


def in_extras(folder: Path, dice: random.Random) -> str:
    """What nobody asked for, beside the files or in the index: it is not read."""
    kind = dice.choice(["index", "files", "links"])
    if kind == "index":
        index = folder / "model.safetensors.index.json"
        said = json.loads(index.read_text())
        for name in said["weight_map"]:
            said["weight_map"][name] = dice.choice(
                ["../../outside", "/dev/zero", "", "model.safetensors", "C:\\x"]
            )
        index.write_text(json.dumps(said))
    elif kind == "files":
        name = dice.choice(
            ["model.safetensors", "pytorch_model.bin", "model-00009-of-00009.safetensors", "torch.py", "x"]
        )
        (folder / name).write_bytes(dice.randbytes(99))
    else:
        (folder / "torch").symlink_to("/")
        os.mkfifo(folder / "config.json")
    return f"extras: {kind}"


MUTATIONS: list[Callable[[Path, random.Random], str]] = [
    in_bytes, in_bytes, in_bytes, in_fields, in_fields, in_fields, in_fields, in_tensors, in_tensors, in_header, in_files, in_shapes,
    in_text, in_text, in_meaning, in_meaning, in_extras,
]  # fmt: skip


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


# ------------------------------------------------------------------------------------------------ what becomes of it


def outcome(folder: Path, wanted: dict[str, Any], signed: bool) -> str:
    """What loading gives: "refused", "same", "another" (of a signed folder), or what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = depgraph.load(factory, folder)
    except depgraph.DepgraphError as error:
        str(error).encode()  # can be printed
        return "refused"
    except BaseException as error:  # noqa: BLE001
        return f"WRONG: {type(error).__name__}: {error!r:.300}"
    try:
        same = repr(state(model)) == repr(wanted)
    except Exception as error:  # noqa: BLE001
        return "another" if signed else f"WRONG: what was loaded fails: {error!r:.300}"
    return "same" if same else "another" if signed else "WRONG: loaded something else"


def alone(work: Callable[[], str]) -> str:
    """`work` in a process of its own, with limits on time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        # address space for mapped files is not memory: weights of 2^42 bytes are mapped before they are refused
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, used + BYTES))
        text = "WRONG: nothing said"
        try:
            text = work()
        except BaseException as error:  # noqa: BLE001
            text = f"WRONG: {error!r:.300}"
        finally:
            os.write(writer, text.encode("utf-8", "replace")[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said if status == 0 and said else f"WRONG: ended with status {status}"


def try_seed(
    seed: int,
    original: Path,
    scratch: Path,
    wanted: dict[str, Any],
    alone: Callable[[Callable[[], str]], str] = alone,
) -> tuple[str, str]:
    """What `seed` changes in a copy of the folder, and what loading it gives."""
    dice = random.Random(seed)
    folder = scratch / f"seed{seed}" / "saved"
    shutil.copytree(original, folder)
    kind = dice.choice(MUTATIONS)(folder, dice)
    signed = kind.endswith("signed") or kind in ("files: names", "shapes: huge")
    said = alone(lambda: outcome(folder, wanted, signed))
    shutil.rmtree(folder.parent)
    return kind, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch) / "original"
        wanted = state(saved(original))
        assert outcome(original, wanted, signed=False) == "same"
        for seed in range(arguments.start, arguments.start + arguments.count):
            kind, said = try_seed(seed, original, Path(scratch), wanted)
            found[kind][said.partition(":")[0]] += 1
            if said.startswith("WRONG"):
                wrong.append(f"seed {seed}, {kind}: {said}")
    table = Table("what was changed", "folders", "refused", "the same model", "another, signed", "wrong")
    for kind, counts in sorted(found.items()):
        table.add_row(
            kind, *map(str, (counts.total(), *(counts[n] for n in ("refused", "same", "another", "WRONG"))))
        )
    console = Console()
    console.print(table)
    total = sum(found.values(), collections.Counter())
    console.print(f"{total.total()} folders: {dict(total)}")
    for line in wrong:
        console.print(line, markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
