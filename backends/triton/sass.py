"""Static facts of a cubin: registers, spills, instructions, loops. From the disassembler in Triton's wheel; no GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")
_PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "IGMMA", "IMMA", "FFMA", "HFMA2", "UTCHMMA")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its name with all suffixes, its operands."""

    address: int
    name: str
    operands: str

    @property
    def family(self) -> str:
        """The name before the first dot."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Usage:
    """Registers of a thread; bytes of stack and of local memory (spills) of a thread."""

    registers: int
    stack: int
    local: int


def resource_usage(cubin: Path) -> Usage:
    """What a kernel takes, as its assembler noted."""
    found = _USAGE.search(_cuobjdump("--dump-resource-usage", cubin))
    assert found is not None, f"cuobjdump says nothing of {cubin}"
    registers, stack, _, local = map(int, found.groups())
    return Usage(registers, stack, max(stack, local))


def disassemble(cubin: Path) -> list[Instruction]:
    """The instructions of a cubin with one kernel, in order."""
    found = map(_LINE.match, _cuobjdump("--dump-sass", cubin).splitlines())
    return [Instruction(int(m.group(1), 16), m.group(2), m.group(3)) for m in found if m]


def loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of loops: from the target of a branch backwards to the branch.

    A branch that enters the middle of a loop from behind its end makes none: it comes back from where the assembler put
    a wait that seldom takes long.
    """
    found = []
    for instruction in instructions:
        target = _TARGET.search(instruction.operands) if instruction.family == "BRA" else None
        if target and int(target.group(1), 16) < instruction.address:
            found.append((int(target.group(1), 16), instruction.address))
    whole = [(s, e) for s, e in found if not any(start < s <= end < e for start, end in found)]
    return [[i for i in instructions if start <= i.address <= end] for start, end in whole]


def main_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop that loads from memory and multiplies: of those, the one with the most loads."""

    def count(body: Sequence[Instruction], families: Sequence[str]) -> int:
        return sum(i.family in families for i in body)

    able = [body for body in loops(instructions) if count(body, _LOADS) and count(body, _PRODUCTS)]
    inner = [
        body
        for body in able
        if not any(
            o is not body and o[0].address >= body[0].address and o[-1].address <= body[-1].address for o in able
        )
    ]
    return max(inner, key=lambda body: (count(body, _LOADS), len(body)), default=[])


def _cuobjdump(option: str, cubin: Path) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
