"""The text of a compiled XLA program: products, memory traffic and collectives, loops counted."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "custom-call-barrier"),
}
_SLICES = ("dynamic-slice", "slice", "gather", "bitcast")
_GOES_ON = re.compile("async-collective-done|async_collective_fusion")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    is_on_chip: bool = False  # S(1), a TPU's vector memory: its traffic is free

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        found = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(found.group()) if found else 8)
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its result's arrays, and the names of what it reads and calls."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def moved(self) -> int:
        """Bytes that lie in the chip's main memory."""
        return sum(array.bytes for array in self.arrays if not array.is_on_chip)

    @property
    def op_name(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""

    def dimensions(self, which: str) -> list[int]:
        """The numbers of an attribute such as `lhs_contracting_dims={1}`, or of its JSON form."""
        found = re.search(rf"{which}=\{{([\d,]*)\}}", self.text)
        json_form = which.replace("dims", "dimensions")
        found = found or re.search(rf'"{json_form}":\[([^\]]*)\]', self.text)
        return [int(n) for n in re.findall(r"\d+", found.group(1))] if found else []


Computation = dict[str, Instruction]


class Program:
    """A compiled program by its computations; `executed` walks what runs, with its count."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if line and not line[0].isspace() and (start := _START.match(line)):
                current = self.computations[start.group(2)] = {}
                self.entry = start.group(2) if start.group(1) else self.entry
            elif line[:1].isspace() and (found := _LINE.match(line)):
                instruction = _parse(found.group(2), found.group(3), bool(found.group(1)))
                current[instruction.name] = instruction

    def executed(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, int]]:
        """Each instruction outside of fusions and how often it runs; loops without count: once."""
        for instruction in self.computations[name or self.entry].values():
            yield instruction, times
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                for called in instruction.called:
                    yield from self.executed(called, times * self.trip_count(instruction))

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instruction, or what a fusion is made of."""
        if instruction.opcode != "fusion":
            yield instruction
            return
        for called in instruction.called:
            for inner in self.computations[called].values():
                yield from self.inside(inner)

    def collectives(self) -> Iterator[tuple[Instruction, int]]:
        """Each collective and how often it runs.

        A TPU's asynchronous one stands in a fusion where it starts, and again in those where it
        goes on and ends.
        """
        for instruction, times in self.executed():
            if not _GOES_ON.search(f"{instruction.name} {instruction.called}"):
                for inner in self.inside(instruction):
                    if inner.opcode.removesuffix("-start") in COLLECTIVES:
                        yield inner, times

    def trip_count(self, loop: Instruction) -> int:
        """XLA's own figure, or the bound that JAX's counter, from 0, stays below."""
        if found := re.search(r'known_trip_count[":{ n]*(\d+)', loop.text):
            return int(found.group(1))
        condition = re.search(r"condition=%([\w.\-]+)", loop.text)
        for line in self.computations[condition.group(1)].values() if condition else ():
            if line.opcode == "constant" and (bound := re.match(r"constant\((\d+)\)", line.text)):
                return int(bound.group(1))
        return 1

    @functools.cached_property
    def _homes(self) -> dict[int, Computation]:
        return {id(i): home for home in self.computations.values() for i in home.values()}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        home = self._homes[id(instruction)]
        return [home[name] for name in instruction.operands if name in home]

    # ---- what it costs --------------------------------------------------------------------------

    def flops(self, instruction: Instruction) -> float:
        """Of a product [multiplications and additions]; 0 of anything else."""
        if not is_product(instruction) or not instruction.arrays:
            return 0.0
        operands = self.operands(instruction)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, operands)
        contracted = instruction.dimensions("lhs_contracting_dims")
        lhs = operands[0].arrays[0].dims
        return 2.0 * instruction.arrays[0].size * math.prod(lhs[axis] for axis in contracted)

    def traffic(self, instruction: Instruction) -> int:
        """Bytes that it reads from memory and writes to it; inside a fusion nothing is."""
        if instruction.opcode in _FREE or instruction.opcode in ("while", "call", "conditional"):
            return 0
        if instruction.opcode.endswith(("-done", "-start", "-update")):
            return 0
        if instruction.opcode == "fusion":
            return self._fusion_traffic(self.computations[instruction.called[0]])
        operands = self.operands(instruction)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].moved
        if instruction.opcode in _SLICES:
            return 2 * instruction.moved
        return instruction.moved + sum(operand.moved for operand in operands)

    def _fusion_traffic(self, fused: Computation) -> int:
        users: dict[str, list[Instruction]] = {}
        for inner in fused.values():
            for name in inner.operands:
                users.setdefault(name, []).append(inner)
        (root,) = (inner for inner in fused.values() if inner.is_root)
        roots = [fused[n] for n in root.operands] if root.opcode == "tuple" else [root]
        updates = {_unwrapped(fused, r).name: _unwrapped(fused, r) for r in roots}
        updates = {n: r for n, r in updates.items() if r.opcode == "dynamic-update-slice"}
        in_place = {_unwrapped(fused, fused[r.operands[0]]).name for r in updates.values()}
        total = 0
        for inner in fused.values():
            if inner.opcode == "parameter" and inner.name not in in_place:
                uses = users.get(inner.name, [])
                is_sliced = uses and all(
                    use.opcode in _SLICES[:3] and use.operands[0] == inner.name for use in uses
                )
                total += sum(use.moved for use in uses) if is_sliced else inner.moved
        for r in roots:
            update = updates.get(_unwrapped(fused, r).name)
            total += fused[update.operands[1]].moved if update else r.moved
        return total


def is_product(instruction: Instruction) -> bool:
    """Whether it is a matrix product, in XLA's own form or as a call of cuBLAS."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    return instruction.opcode == "custom-call" and "cublas" in instruction.text


def received(instruction: Instruction, n_devices: int) -> float:
    """Bytes that a collective brings each device over the network, done as a ring."""
    kind, size = instruction.opcode.removesuffix("-start"), _bytes_of_result(instruction)
    n = group_size(instruction) or n_devices
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) / n if kind != "collective-permute" else size


def _bytes_of_result(collective: Instruction) -> int:
    """One that only starts names its operands before its results, but for the start of a sum."""
    n, arrays = len(collective.operands), collective.arrays
    if collective.opcode.endswith("-start") and not collective.opcode.startswith("all-reduce"):
        arrays = arrays[n : 2 * n]
    return sum(array.bytes for array in arrays)


def group_size(instruction: Instruction) -> int:
    """How many devices take part in a collective together; 0 where the text does not say."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.text):
        return int(found.group(1))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.text)
    return len(found.group(1).split(",")) if found else 0


def _unwrapped(fused: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands:
        instruction = fused[instruction.operands[0]]
    return instruction


def _parse(name: str, rest: str, is_root: bool) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, arguments = rest.strip().partition("(")
    operands = arguments[: _closing(arguments)]
    called = _CALLED.findall(arguments)
    names = tuple(name[1:] for group in called for name in group.split(", "))
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in layout)
        for dtype, dims, layout in _SHAPE.findall(shape)
    )
    return Instruction(
        name, arrays, opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), names, rest, is_root
    )


def _split_shape(rest: str) -> tuple[str, str]:
    if not rest.startswith("("):
        shape, _, rest = rest.partition(" ")
        return shape, rest
    end = _closing(rest[1:]) + 2
    return rest[:end], rest[end:]


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the beginning closes."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    return len(text)


def _convolution_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """A TPU's form of a product: input features are summed, and so is a window of one result.

    A window with as many results as it is long stands for the batch of a product.
    """
    found = re.search(r"dim_labels=\w+_(\w+)->(\w+)", instruction.text)
    kernel, result = found.groups() if found else ("", "")
    results = dict(zip(result, instruction.arrays[0].dims, strict=True))
    summed = 1.0
    for label, size in zip(kernel, operands[1].arrays[0].dims, strict=True):
        if label != "o":
            summed *= max(1, size / results.get(label, 1))
    return 2.0 * instruction.arrays[0].size * summed
