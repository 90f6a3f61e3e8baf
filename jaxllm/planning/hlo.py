"""What a compiled program says of itself, read from its text: `cost_analysis` counts loops once, and vector memory as if it were HBM.

Loops are counted as often as they run. Of a conditional the cheapest branch is: in the engine's steps, that of a batch of greedy
requests that ask for nothing else. Of a program for the CPU what crosses memory is what it is given, and what is too large for its
caches.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from jaxllm.sharding.chips import Chip

_VIEW = "output_to_operand_aliasing={{}: (0, {})}"  # a fusion in a fusion: its operand in another tiling, made as it is read
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_OP_NAME = re.compile(r'op_name="([^"]*)"|$')
_NAME = re.compile(r"%([\w.\-]+)")
# As Mosaic writes it, and as our Triton kernels do in their metadata.
_ESTIMATES = (
    re.compile(r'cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"'),
    re.compile(r"serialized_metadata = .*?flops\\22: \\22(\d+)\\22.*?bytes_accessed\\22: \\22(\d+)\\22"),
)

# What the TPU's compiler expects an instruction to take, loops once; it says nothing of kernels, nor of sorts.
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# What a CPU's step makes, and reads again at once, stays in its caches if it is smaller (the last level's share of a core, or more).
_CPU_CACHE_BYTES = 4 << 20

# JAX's splash attention gives no estimate. Products of [T, T] scores with [T, D] in each of its kernels; they skip the half that
# causality hides (of what a sliding window hides nothing is taken off).
_SPLASH = re.compile(r"%splash_m[hq]a_(fwd|dq|dkv)\S* = .*?operand_layout_constraints=\{.*?(?:bf16|f32)\[(\d+),(\d+),(\d+)\]")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size in a run of a program: how many, and the bytes of their results on a device."""

    kind: str
    count: int
    bytes: int


@dataclass
class Cost:
    """Of a run on one device: bytes between HBM and the chip, operations of Pallas kernels and of products of matrices, and collectives
    (kind, bytes) -> count. `cycles` is the compiler's estimate, and `unestimated_bytes` are those of instructions that have none."""

    hbm_bytes: float = 0
    kernel_flops: float = 0
    product_flops: float = 0
    cycles: float = 0
    unestimated_bytes: float = 0
    collectives: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, other: "Cost", times: float = 1) -> None:
        self.hbm_bytes += times * other.hbm_bytes
        self.kernel_flops += times * other.kernel_flops
        self.product_flops += times * other.product_flops
        self.cycles += times * other.cycles
        self.unestimated_bytes += times * other.unestimated_bytes
        for key, count in other.collectives.items():
            self.collectives[key] += times * count

    def compiler_s(self, chip: Chip) -> float | None:
        """Seconds of a run: the compiler's cycles, one instruction after another, and for what it gives none (kernels, sorts) the least
        that the chip's bandwidth and peak allow. None if there is no estimate at all, as from a GPU's compiler."""
        if not self.cycles or chip.hertz is None:
            return None
        return self.cycles / chip.hertz + max(self.unestimated_bytes / chip.bandwidth, self.kernel_flops / chip.flops)

    def list_collectives(self) -> list[Collective]:
        return [Collective(kind, count, count * size) for (kind, size), count in sorted(self.collectives.items())]


@dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    least: int = 0  # bytes that an array must have to be in memory, and not in a cache

    @cached_property
    def bytes(self) -> int:
        """Of its results in HBM; arrays in other memories say so in their layout."""
        arrays = _ARRAY.findall(self.shape)
        sizes = (_size(kind, sizes) for kind, sizes, layout in arrays if not re.search(r"S\([1-9]", layout or ""))
        return sum(size for size in sizes if size >= self.least)

    @cached_property
    def any_bytes(self) -> int:
        """Of its largest result, in whatever memory."""
        return max((_size(kind, sizes) for kind, sizes, _ in _ARRAY.findall(self.shape)), default=0)

    def called(self, key: str) -> str | None:
        match = re.search(rf"{key}=%([\w.\-]+)", self.line)
        return match[1] if match else None


class Program:
    """The computations of a program's text, for a TPU or (`platform`) a GPU, where memory space 1 is device memory for collectives, or a
    CPU. `trips`: how often loops run whose ends are not known before they do, by the innermost `jax.named_scope` around them."""

    def __init__(self, text: str, platform: str = "tpu", trips: Mapping[str, float] | None = None):
        self._scopes = trips or {}
        if platform == "gpu":
            text = re.sub(r"(\{[\d,:TL()]*)S\(1\)\}", r"\1}", text)
        self._ops: dict[str, dict[str, _Op]] = {}
        self._entry = ""
        headers = list(_COMPUTATION.finditer(text))
        for header, following in zip(headers, [*headers[1:], None], strict=True):
            body = text[header.end() : following.start() if following else len(text)]
            ops = [op for op in map(_parse, body.splitlines()) if op]
            self._ops[header[2]] = {op.name: op for op in ops}
            if header[1]:
                self._entry = header[2]
        if platform == "cpu":
            self._keep_in_caches()

    def _keep_in_caches(self) -> None:
        """Small arrays are not in memory, but for those that the program is given, seen in whatever shape."""
        for computation, ops in self._ops.items():
            given = set()
            for name, op in ops.items():
                if computation == self._entry and (op.opcode == "parameter" or op.opcode == "bitcast" and op.operands[0] in given):
                    given.add(name)
                else:
                    ops[name] = replace(op, least=_CPU_CACHE_BYTES)

    def cost(self) -> Cost:
        return self._cost(self._entry)

    def _cost(self, computation: str) -> Cost:
        total, ops = Cost(), self._ops.get(computation, {})
        for op in ops.values():
            if op.opcode == "while":
                total.add(self._cost(op.called("body")), self._trips(op))
            elif op.opcode == "conditional":
                branches = [self._cost(name) for name in self._branches(op)]
                if branches:
                    total.add(min(branches, key=lambda cost: cost.hbm_bytes))
            elif op.opcode in ("call", "call-start", "async-start"):  # the last two: on another thread, as v7x's sparse cores are
                total.add(self._cost(op.called("to_apply") or op.called("calls")))
            elif op.opcode not in _FREE and not op.opcode.endswith(("-done", "-update")):
                moved = total.hbm_bytes
                self._one(op, ops, total)
                if match := _CYCLES.search(op.line):
                    total.cycles += int(match[1])
                else:
                    total.unestimated_bytes += total.hbm_bytes - moved
        return total

    def _one(self, op: _Op, ops: dict[str, _Op], total: Cost) -> None:
        kind = op.opcode.removesuffix("-start")
        total.product_flops += self._products(op, ops)
        if kind in _COLLECTIVES:
            total.collectives[kind, op.any_bytes] += 1
        estimate = next(filter(None, (pattern.search(op.line) for pattern in _ESTIMATES)), None)
        if estimate:
            total.kernel_flops += int(estimate[1])
            total.hbm_bytes += int(estimate[2])
        elif splash := _SPLASH.search(op.line):
            heads, length, dim = map(int, splash.groups()[1:])
            total.kernel_flops += _SPLASH_PRODUCTS[splash[1]] * 2 * heads * length * length / 2 * dim
            total.hbm_bytes += op.bytes + sum(ops[o].bytes for o in op.operands if o in ops)
        elif 'custom_call_target="AllocateBuffer"' in op.line:
            return  # room, with nothing in it
        elif op.opcode == "fusion":
            fused = op.called("calls")
            total.hbm_bytes += sum(self._read(fused, i, ops[o].bytes) for i, o in enumerate(op.operands) if o in ops and ops[o].bytes)
            total.hbm_bytes += self._written(fused, op.bytes)
        elif op.opcode.endswith("-start") and kind not in _COLLECTIVES:  # (destination, source, ...): a copy, or a slice
            arrays = [array for array in _ARRAY.findall(op.shape)][:2]
            moved = min(_size(a[0], a[1]) for a in arrays) if len(arrays) == 2 else op.any_bytes
            total.hbm_bytes += moved * sum(not re.search(r"S\([1-9]", a[2] or "") for a in arrays)
        elif kind in ("dynamic-slice", "slice", "gather"):
            total.hbm_bytes += op.bytes + (op.any_bytes if op.operands and op.operands[0] in ops and ops[op.operands[0]].bytes else 0)
        elif kind == "dynamic-update-slice":
            total.hbm_bytes += 2 * ops[op.operands[1]].any_bytes if op.bytes else 0
        elif kind == "scatter":  # in place, as an update of a slice is: the compiler adds a copy where it cannot be
            total.hbm_bytes += sum(ops[o].bytes for o in op.operands[1:] if o in ops) + (_scattered(op, ops) if op.bytes else 0)
        else:
            total.hbm_bytes += op.bytes + sum(ops[o].bytes for o in op.operands if o in ops)

    def _products(self, op: _Op, ops: dict[str, _Op]) -> float:
        """Operations of a product of matrices (a TPU's are convolutions), or of those in a fusion."""
        if op.opcode == "fusion":
            fused = self._ops.get(op.called("calls") or "", {})
            return sum(self._products(inner, fused) for inner in fused.values())
        if op.opcode not in ("dot", "convolution") or not all(o in ops for o in op.operands):
            return 0
        out, left, right = (_values(shape) for shape in (op.shape, *(ops[o].shape for o in op.operands[:2])))
        # |left| |right| / |out| = batches * contracted^2. In a convolution, batches are spatial axes.
        batches = 1
        if match := re.search(r"lhs_batch_dims=\{([\d,]+)\}", op.line):
            axes = _axes(ops[op.operands[0]].shape)
            batches = prod(axes[int(i)] for i in match[1].split(","))
        elif match := re.search(r"window=\{size=([\dx]+)", op.line):
            batches = prod(map(int, match[1].split("x")))
        return 2 * out * (left * right / out / batches) ** 0.5 if out else 0

    def _read(self, computation: str | None, index: int, whole: int) -> int:
        """Bytes of its operand `index` that a fused computation reads: where it only takes slices, those."""
        ops = self._ops.get(computation or "", {})
        name = next((op.name for op in ops.values() if op.opcode == "parameter" and f"parameter({index})" in op.line), None)
        return whole if name is None else min(whole, self._uses(ops, name, whole))

    def _uses(self, ops: dict[str, _Op], name: str, whole: int) -> int:
        read = 0
        for op in ops.values():
            if name not in op.operands:
                continue
            if (op.opcode == "bitcast" or _VIEW in op.line) and "ROOT " not in op.line:
                read += self._uses(ops, op.name, whole)
            elif op.opcode in ("dynamic-slice", "slice", "gather") and op.operands[0] == name:
                read += op.any_bytes
            elif op.opcode in ("dynamic-update-slice", "scatter") and op.operands[0] == name:
                continue  # written in place
            elif op.opcode == "fusion":
                read += sum(self._read(op.called("calls"), i, whole) for i, o in enumerate(op.operands) if o == name)
            else:
                return whole
        return read

    def _written(self, computation: str | None, whole: int) -> int:
        """Bytes that a fusion writes: where it updates a slice or rows of an operand in place, those."""
        ops = self._ops.get(computation or "", {})
        root = next((op for op in ops.values() if "ROOT " in op.line), None)
        if root is not None and root.opcode == "dynamic-update-slice" and root.operands[1] in ops:
            return min(whole, ops[root.operands[1]].any_bytes)
        if root is not None and root.opcode == "scatter":
            return min(whole, _scattered(root, ops))
        return whole

    def _trips(self, op: _Op) -> float:
        """What the loop's counter is compared with: our loops count up from 0 by 1."""
        if scopes := [scope for scope in (_OP_NAME.search(op.line)[1] or "").split("/") if scope in self._scopes]:
            return self._scopes[scopes[-1]]
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.line):
            return int(match[1])
        condition = self._ops.get(op.called("condition") or "", {})
        constants = [int(m[1]) for o in condition.values() if (m := re.search(r" constant\((\d+)\)", o.line))]
        return max(constants, default=1)

    def _branches(self, op: _Op) -> list[str]:
        if match := re.search(r"branch_computations=\{([^}]*)\}", op.line):
            return _NAME.findall(match[1])
        return [name for key in ("true_computation", "false_computation") if (name := op.called(key))]


def _scattered(op: _Op, ops: dict[str, _Op]) -> int:
    """Bytes of a scatter's updates, its last operand. One of several arrays at once is taken for all that it returns."""
    return ops[op.operands[2]].any_bytes if len(op.operands) == 3 and op.operands[2] in ops else op.any_bytes


def _parse(line: str) -> _Op | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals or not rest:
        return None
    end = _balanced(rest, 0) if rest[0] == "(" else rest.find(" ")
    opcode, opened, _ = rest[end:].strip().partition("(")
    if not opened:
        return None
    start = rest.index(opcode + "(", end) + len(opcode)
    operands = _NAME.findall(rest[start : _balanced(rest, start)])
    return _Op(head.removeprefix("ROOT ").lstrip("%"), rest[:end], opcode, tuple(operands), line)


def _balanced(text: str, start: int) -> int:
    """Past the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _axes(shape: str) -> list[int]:
    """Of an array's shape as it is written."""
    match = _ARRAY.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def _values(shape: str) -> int:
    return prod(_axes(shape))


def _size(kind: str, sizes: str) -> int:
    return _BITS.get(kind, 0) * prod(int(n) for n in sizes.split(",") if n) // 8


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on a device: arguments, results that are not written over arguments, temporaries, code."""
    m = compiled.memory_analysis()
    return {
        "arguments": m.argument_size_in_bytes,
        "results": m.output_size_in_bytes - m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
