"""What a compiled program does: bytes, kernels and collectives, read off its optimised HLO, and
control flow, off the list of what it launches.

Every array that a kernel reads or writes counts, also one that may stay in a GPU's L2 cache: what
is counted is an upper bound of the traffic. Loops count by their known trip counts, a conditional
by the branch that moves most. Of a parameter of a fusion counts what its slices and gathers give,
and of a buffer that is updated in place the updates alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BITS = {
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3", "f8e8m0fnu"), 8),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
}
_ARRAY = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\]")
# What moves nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "fusion-done", "async-done", "async-update", "copy-done",
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
SMALL = 10_000  # bytes of an operand that a kernel may as well read whole


@dataclass(frozen=True)
class Instruction:
    """One instruction of HLO: ``name = type op(operands), attributes``; ``text`` is what stands
    between the parentheses."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in its attributes; empty where there is none."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def origin(self) -> str:
        """The end of its path in the program's source."""
        return self.attribute(r'op_name="([^"]*)"')[-70:]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Item:
    """What a program does ``times`` times.

    Attributes:
        kind: gemm, fusion, mosaic, collective, conditional, while or the name of an operation.
        label: for a reader.
        bytes: read and written each time.
        times: how often.
        kernels: launched each time.
    """

    kind: str
    label: str
    bytes: float
    times: int = 1
    kernels: int = 1


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO text by their names, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{") and "(" in line:
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if head:
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif " = " in line and line[:1].isspace():
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, right = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    split = _closing(right) if right.startswith("(") else right.index(" ")
    kind, rest = right[:split], right[split:].strip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    text = rest[start + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", text))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(
        name, kind, rest[:start], operands, text, rest[end:], left.startswith("ROOT ")
    )


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


def arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all arrays of an HLO type."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(kind)
    ]


def num_bytes(kind: str) -> float:
    """Of all arrays of an HLO type."""
    return sum(BITS[dtype] / 8 * math.prod(shape) for dtype, shape in arrays(kind))


@dataclass(frozen=True)
class Program:
    """An optimised program.

    Attributes:
        computations: of :func:`parse`.
        entry: name of the first one.
        kernel_bytes: ``(operand types, result type)``: what a Mosaic kernel reads and writes; only
            its author knows.
    """

    computations: dict[str, Computation]
    entry: str
    kernel_bytes: Callable[[list[str], str], float]

    @functools.cached_property
    def items(self) -> list[Item]:
        """All that it does."""
        return list(self._items(self.entry))

    def _items(self, name: str) -> Iterator[Item]:
        for one in self.computations[name].values():
            if one.op not in _FREE and not one.op.endswith("-done"):
                yield from self._one(one, name)

    def _one(self, one: Instruction, name: str) -> Iterator[Item]:
        here = self.computations[name]
        operands = [here[operand].type for operand in one.operands if operand in here]
        called = one.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
        label, whole = f"{one.name} {one.type[:70]} {one.origin}", num_bytes(one.type)
        read = sum(map(num_bytes, operands))
        if one.op == "while":
            turns = int(one.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield Item("while", label, 0, 1, 0)
            for item in self._items(one.attribute(r"body=%?([\w.\-]+)")):
                yield dataclasses.replace(item, times=item.times * turns)
        elif one.op == "conditional":
            listed = one.attribute(r"branch_computations=\{([^}]*)\}")
            listed = listed or one.attribute(r"((?:true|false)_computation=.*)")
            names = [n for n in re.findall(r"[\w.\-]+", listed) if n in self.computations]
            branches = [list(self._items(branch)) for branch in names]
            yield Item("conditional", label, 0, 1, 0)
            yield from max(branches, key=total_bytes)
        elif one.op in ("call", "async-start") and called:
            yield from self._items(called)
        elif one.op.startswith("fusion"):
            moved = self._fusion(called) - _workspace(one)
            yield Item("gemm" if "gemm" in one.name + one.attributes else "fusion", label, moved)
        elif one.op == "custom-call":
            target = one.attribute(r'custom_call_target="([^"]*)"')
            if "mosaic" in target:
                yield Item("mosaic", label, self.kernel_bytes(operands, one.type))
            else:
                kind = "gemm" if "cublas" in target else target
                yield Item(kind, label, read + whole - _workspace(one))
        elif one.op.removesuffix("-start") in _COLLECTIVES:
            yield Item("collective", f"{one.op} {label}", read)
        else:
            yield Item(one.op, label, read + whole)

    def _fusion(self, name: str) -> float:
        """Bytes that a fused computation reads and writes."""
        inside = self.computations[name]
        users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
        for one in inside.values():
            for place, operand in enumerate(one.operands):
                users[operand].append((one, place))
        root = next(one for one in inside.values() if one.root)
        roots = [inside[x] for x in root.operands] if root.op == "tuple" else [root]
        updated, moved = set(), 0.0
        for one in roots:
            bases, written = _updates(_behind_casts(one, inside), inside)
            updated |= bases
            moved += num_bytes(one.type) if written is None else written
        for one in inside.values():
            if one.op == "parameter" and one.name not in updated:
                moved += _read_of(one, users)
        return moved


def _behind_casts(one: Instruction, inside: Computation) -> Instruction:
    while one.op in ("bitcast", "convert", "copy") and one.operands:
        one = inside[one.operands[0]]
    return one


def _updates(one: Instruction, inside: Computation) -> tuple[set[str], float | None]:
    """Buffers that a root updates in place, and the bytes of the updates; None where it is no
    update."""
    if one.op == "dynamic-update-slice":
        buffers, updates = one.operands[:1], one.operands[1:2]
    elif one.op == "scatter":
        count = (len(one.operands) - 1) // 2
        buffers, updates = one.operands[:count], one.operands[count + 1 :]
    else:
        return set(), None
    bases = {_behind_casts(inside[buffer], inside) for buffer in buffers}
    written = sum(num_bytes(inside[update].type) for update in updates)
    return {base.name for base in bases if base.op == "parameter"}, written


def _read_of(parameter: Instruction, users: dict[str, list[tuple[Instruction, int]]]) -> float:
    """Bytes that a fusion reads of one of its parameters."""
    full, part, todo = num_bytes(parameter.type), 0.0, [parameter.name]
    while todo:
        for user, place in users[todo.pop()]:
            if user.op == "bitcast":
                todo.append(user.name)
            elif user.op in ("dynamic-slice", "slice", "gather") and place == 0:
                part += num_bytes(user.type)
            elif user.op in ("dynamic-slice", "gather") and full < SMALL:
                part += full  # where the slice begins
            elif user.op == "dynamic-update-slice" and place > 1 and full < SMALL:
                part += full
            else:
                return full
    return min(part, full)


def _workspace(one: Instruction) -> float:
    """Bytes of scratch memory that a library's product has among its results."""
    if "gemm" not in one.name + one.attributes and "cublas" not in one.attributes:
        return 0
    return sum(math.prod(shape) for dtype, shape in arrays(one.type) if dtype == "s8")


def total_bytes(items: list[Item]) -> float:
    """Moved by all of them."""
    return sum(item.bytes * item.times for item in items)


def count(items: list[Item], kind: str) -> int:
    """How often a kind of item happens."""
    return sum(item.times for item in items if item.kind == kind)


def largest(items: list[Item], top: int) -> list[str]:
    """A line for each of the items that move most."""
    found = sorted(items, key=lambda item: -item.bytes * item.times)[:top]
    return [
        f"{item.bytes * item.times / 1e9:8.3f} GB = {item.times:4d} x {item.bytes / 1e6:9.2f} MB "
        f"[{item.kind}] {item.label}"
        for item in found
    ]


Thunk = tuple[str, bool]  # what is launched, and whether a command buffer holds it


def read_thunks(dump: Path) -> list[Thunk]:
    """All that a program launches, where ``--xla_dump_to`` and ``--xla_dump_hlo_as_text`` have
    written it."""
    texts = [file.read_text() for file in dump.glob("*thunk_sequence_after_thunk_passes.txt")]
    found: list[Thunk] = []
    around: list[tuple[int, str]] = []
    for line in max(texts, key=len).splitlines():
        thunk = re.match(r"( *)\d+: k(\w+)", line)
        if thunk:
            depth, kind = len(thunk[1]), thunk[2]
            around = [one for one in around if one[0] < depth]
            found.append((kind, "CommandBuffer" in [kind for _, kind in around]))
            around.append((depth, kind))
    return found


def outside(thunks: list[Thunk], kind: str) -> int:
    """How many of a kind no command buffer holds: conditions among them keep the host waiting."""
    return sum(one == kind and not held for one, held in thunks)
