"""The collectives of a compiled program, and what a device sends for each of them."""

import math
import re
from typing import NamedTuple

import numpy as np

AXES = ("data", "fsdp", "tensor")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Instruction(NamedTuple):
    """One line of a program: its name, its result's type, what it does to what."""

    name: str
    type: str
    op: str
    rest: str


class Collective(NamedTuple):
    """One exchange: what kind, over which axes, how often, what a device sends."""

    kind: str
    axes: tuple[str, ...]
    type: str
    where: str
    times: int
    sent: float


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, and the name of the entry."""
    found, entry, current = {}, "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = found.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif match := INSTRUCTION.match(line):
            current.append(Instruction(*match.groups()))
    return found, entry


def sizes_of(type_: str) -> list[int]:
    """The bytes of each array of a type."""
    return [
        math.prod(int(d) for d in dims.split(",") if d) * BYTES[kind]
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_)
        if kind in BYTES
    ]


def _numbers(devices: int, shape: str | None, order: str | None) -> np.ndarray:
    """All devices, counted along the axes of a shape in another order of them."""
    numbers = np.arange(devices)
    if shape:
        numbers = numbers.reshape([int(n) for n in shape.split(",")])
    if order:
        numbers = numbers.transpose([int(n) for n in order.split(",")])
    return numbers


def first_group(rest: str, devices: int) -> list[int]:
    """The numbers of the devices in the first group of a collective."""
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    named = rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}"
    if match := re.search(named, rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'", match[4])
        numbers = _numbers(devices, match[2], match[3])
        numbers = numbers.reshape([int(n) for n in sizes.values()])
        return numbers[
            tuple(slice(None) if axis in axes else 0 for axis in sizes)
        ].ravel()
    iota = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(iota, rest):
        numbers = _numbers(devices, match[3], match[4])
        return numbers.reshape(int(match[1]), int(match[2]))[0]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(n) for n in match[1].split(",")]
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(match[1]), int(match[2])]
    return list(range(devices))


def trip_count(loop: Instruction, computations: dict) -> int:
    """The turns of a loop that counts up to a constant."""
    if known := re.search(r'known_trip_count[":{n]+(\d+)', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)[1]
    limits = [
        int(i.rest.split(")")[0])
        for i in computations[condition]
        if i.op == "constant" and i.type.startswith("s32[]")
    ]
    return max(limits, default=1)


def collectives(text: str, mesh: tuple[int, int, int]) -> list[Collective]:
    """All collectives of a program, with the turns of the loops they are in."""
    computations, entry = parse(text)
    found = []

    def visit(name: str, times: int) -> None:
        lines = computations[name]
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind in COLLECTIVES:
                found.append(_measured(line, kind, lines, times, mesh))
                continue
            turns = trip_count(line, computations) if line.op == "while" else 1
            for key in ("body", "calls", "called_computation", "to_apply"):
                for called in re.findall(rf"{key}=%?([\w.-]+)", line.rest):
                    if key != "to_apply" or line.op == "call":
                        visit(called, times * turns)

    visit(entry, 1)
    return found


def _measured(line, kind, lines, times, mesh) -> Collective:
    sizes = sizes_of(line.type)
    # An asynchronous start has its operands in its type too.
    started = line.op.endswith("-start") and line.type.startswith("(")
    size = max(sizes) if started and kind != "all-reduce" else sum(sizes)
    group = first_group(line.rest, math.prod(mesh))
    n = len(group)
    places = np.unravel_index(group, mesh)
    axes = tuple(a for a, at in zip(AXES, places) if len(set(at.tolist())) > 1)
    if kind == "all-reduce" and _sliced(line.name, lines):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= n  # of its operand
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
    where = re.search(r'op_name="([^"]*)"', line.rest)
    sent = size * share.get(kind, (n - 1) / n) * times
    return Collective(kind, axes, line.type, where[1] if where else "", times, sent)


def _sliced(name: str, lines: list[Instruction]) -> bool:
    """Whether nothing but slices of a value is used."""
    users = [i for i in lines if re.search(rf"%{re.escape(name)}[,)]", i.rest)]
    same = ("reshape", "bitcast", "copy")
    return bool(users) and all(
        i.op == "dynamic-slice" or (i.op in same and _sliced(i.name, lines))
        for i in users
    )
