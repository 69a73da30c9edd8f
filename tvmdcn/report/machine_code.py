# SPDX-License-Identifier: Apache-2.0
"""What compiled code looks like: its innermost loops, the one that computes most, and what they use.

Read statically, from the assembly that LLVM writes or from what a disassembler makes of a library; nothing is run. How
often a loop runs is not known here: the one with the most arithmetic is taken for the hottest.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvmdcn.errors import ArtifactError

__all__ = ["Loop", "MachineCode", "disassemble"]

_DISASSEMBLERS = ("objdump", "llvm-objdump")
_TIMEOUT = 60.0

# A number sign before a number is ARM's, and belongs to the instruction.
_COMMENT = re.compile(r"\s*(?:#(?!-?\d)|//|\s;)")
_JUMP = re.compile(r"(?:j\w+|b|b\.\w+|cbn?z|tbn?z)$")
# Operands that differ from build to build and mean nothing: addresses relative to the instruction.
_RELATIVE = re.compile(r"(?:-?0x[0-9a-f]+|[.\w]+)(?=\(%rip\))")
_HEXADECIMAL = re.compile(r"-?0x[0-9a-f]+(?=\()|(?<=\$)-?0x[0-9a-f]+")
_SUFFIX = re.compile(r"^(add|and|cmp|dec|imul|inc|lea|mov|neg|or|sar|shl|shr|sub|test|xor)[bwlq]$")
_FUSED = re.compile(r"vfn?m(?:add|sub)|fml[as]|fn?m(?:add|sub)")
_ARITHMETIC = re.compile(r"v?(?:mul|add|sub)[ps][sd]$|v?dp\w*ps|f(?:mul|add|sub)$")
_BROADCAST = re.compile(r"vbroadcast|\{1to\d+\}|ld1r|\bdup$|vpbroadcast")
_STACK = re.compile(r"\(%[re][sb]p|\[(?:sp|x29)")
_MEMORY = re.compile(r"\(%|\[[xs]\w")
_STORE = re.compile(r"v?mov(?:[aunhl]+p[sd]|dq\w*|s[sd]|n\w+|[bwlqd])?$|v?pextr|vextract|st[rpu]\w*$|st\d$|vscatter")
# Registers by width in bits.
_REGISTERS = {
    512: re.compile(r"%zmm\d+"),
    256: re.compile(r"%ymm\d+"),
    128: re.compile(r"%xmm\d+|\bv\d+\.\w+|\bq\d+\b"),
}
_SCALAR = re.compile(r"(?:s[sd]|ss2sd|sd2ss|si2s[sd]|s[sd]2u?si)$")  # scalars live in xmm registers too


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, jumps named by labels within it."""

    function: str
    lines: Sequence[str]

    @property
    def instructions(self) -> list[str]:
        """The instructions, without labels."""
        return [line for line in self.lines if not line.endswith(":")]

    @property
    def work(self) -> int:
        """Bits that its arithmetic computes per turn, those of fused multiply-adds twice."""
        return sum(_arithmetic(text) * _width(text) for text in self.instructions)

    @property
    def writes(self) -> bool:
        """Whether it stores anything but spilled values."""
        return any(_is_store(text) and not _STACK.search(text) for text in self.instructions)

    @property
    def uses(self) -> dict[str, int]:
        """What one turn of the loop does and needs, by name."""
        texts = self.instructions
        loads = [text for text in texts if _is_load(text)]
        registers = {name for text in texts for name in re.findall(r"%[xyz]mm(\d+)|\b[vq](\d+)\b", text)}
        return {
            "instructions": len(texts),
            "fused multiply-adds": sum(_FUSED.match(text) is not None for text in texts),
            "loads": len(loads),
            "broadcasts": sum(_BROADCAST.search(text) is not None for text in texts),
            "stores": sum(_is_store(text) for text in texts),
            "loads and stores of spilled values": sum(_STACK.search(text) is not None for text in texts),
            "vector registers": len(registers),
        }


@dataclass(frozen=True)
class MachineCode:
    """The code of a kernel.

    Parameters
    ----------
    functions : mapping of str to sequence of str
        Instructions and labels of each function, in order; a label ends with a colon, jumps end with a label.
    """

    functions: dict[str, list[str]]

    @classmethod
    def of_assembly(cls, text: str) -> MachineCode:
        """Return the code that LLVM wrote as assembly."""
        functions: dict[str, list[str]] = {}
        lines: list[str] = []
        for raw in text.splitlines():
            line = _COMMENT.split(raw, maxsplit=1)[0].strip()
            if re.fullmatch(r"[A-Za-z_][\w.$]*:", line):
                lines = functions.setdefault(line[:-1], [])
            elif re.fullmatch(r"\.L[\w.$]+:", line) or (line and line[0] not in ".#@"):
                lines.append(_spaced(line))
        return cls(functions)

    @classmethod
    def of_disassembly(cls, text: str) -> MachineCode:
        """Return the code that a disassembler printed (``objdump -d --no-show-raw-insn``)."""
        functions: dict[str, list[str]] = {}
        found: list[tuple[str, str]] = []
        name = ""
        for line in [*text.splitlines(), "0 <>:"]:
            header = re.fullmatch(r"[0-9a-f]+ <(.*)>:", line.strip())
            if header:
                if found:
                    functions[name] = _labelled(found)
                name, found = header[1], []
                continue
            instruction = re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line)
            if instruction:
                found.append((instruction[1], _spaced(_COMMENT.split(instruction[2], maxsplit=1)[0])))
        return cls(functions)

    def only(self, entry: str) -> MachineCode:
        """Return the functions that compute an entry function; all if none bears its name."""
        mine = {name: lines for name, lines in self.functions.items() if entry in name and lines}
        return MachineCode(mine) if mine else self

    def innermost_loops(self) -> list[Loop]:
        """Return the loops without loops inside, those that compute most first.

        Loops that write results come behind those that do not: a sum in registers is written when its loop is over, and
        what is computed and written at every turn is a stage around it.
        """
        loops = [loop for name, lines in self.functions.items() for loop in _loops(name, lines)]
        return sorted(loops, key=lambda loop: (not loop.work or loop.writes, -loop.work))

    @property
    def uses(self) -> dict[str, int]:
        """Instructions in all, and vector instructions by width."""
        texts = [line for lines in self.functions.values() for line in lines if not line.endswith(":")]
        widths = Counter(width for width in map(_vector_width, texts) if width)
        return {
            "instructions": len(texts),
            **{f"{width}-bit vector instructions": widths[width] for width in _REGISTERS},
            "fused multiply-adds": sum(_FUSED.match(text) is not None for text in texts),
        }


def disassemble(library: Path) -> MachineCode:
    """Return the code of a compiled library.

    Raises
    ------
    ArtifactError
        If there is no disassembler, or none that reads the file.
    """
    complaints = []
    for tool in _DISASSEMBLERS:
        path = shutil.which(tool)
        if path is None:
            complaints.append(f"{tool} is not installed")
            continue
        command = [path, "-d", "--no-show-raw-insn", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, errors="replace")
        except (OSError, subprocess.TimeoutExpired) as error:
            complaints.append(f"{tool}: {type(error).__name__}")
            continue
        code = MachineCode.of_disassembly(done.stdout)
        if done.returncode == 0 and code.functions:
            return code
        lines = done.stderr.strip().splitlines()
        complaints.append(f"{tool}: {lines[-1] if lines else 'found no instructions'}")
    raise ArtifactError(f"{library} cannot be disassembled: {'; '.join(complaints)}. Install binutils or LLVM.")


def _spaced(text: str) -> str:
    """Return an instruction with single spaces, one behind each comma of its operands."""
    mnemonic, _, operands = text.replace("\t", " ").strip().partition(" ")
    operands = re.sub(r",(?=\S)(?![^()]*\))", ", ", " ".join(operands.split()))
    operands = re.sub(r"\(([^)]*)\)", lambda found: found[0].replace(" ", "").replace(",1)", ")"), operands)
    # Habits of one tool that the other does not have: one instruction must look alike from both.
    operands = _HEXADECIMAL.sub(lambda found: str(_signed(int(found[0], 16))), operands)
    operands = re.sub(r"\b0(?=\(%)", "", operands).replace(" {", "{").replace("} {", "}{")
    mnemonic = _SUFFIX.sub(r"\1", mnemonic)
    return _RELATIVE.sub("const", f"{mnemonic} {operands}".strip())


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _labelled(found: Sequence[tuple[str, str]]) -> list[str]:
    """Return instructions with a label where a jump goes to, and jumps that name it instead of an address."""
    addresses = {address for address, _ in found}
    targets = {}
    for address, text in found:
        words = text.split()
        if len(words) > 1 and _JUMP.match(words[0]):
            place = next((word.removeprefix("0x") for word in words[1:] if word.removeprefix("0x") in addresses), None)
            if place is not None:
                targets[address] = place
    wanted = set(targets.values())
    lines = []
    for address, text in found:
        if address in wanted:
            lines.append(f".L{address}:")
        if address in targets:
            words = text.split()
            text = " ".join(f".L{targets[address]}" if w.removeprefix("0x") == targets[address] else w for w in words)
            text = re.sub(r" <[^>]*>$", "", text)
        lines.append(text)
    return lines


def _loops(function: str, lines: Sequence[str]) -> list[Loop]:
    """Return the innermost loops of a function: from where a jump goes back to, to the last jump that goes there."""
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    ranges: dict[int, int] = {}
    for index, line in enumerate(lines):
        words = line.split()
        if len(words) > 1 and _JUMP.match(words[0]) and labels.get(words[-1], index) < index:
            first = labels[words[-1]]
            ranges[first] = max(index, ranges.get(first, 0))
    inner = [
        (first, last)
        for first, last in ranges.items()
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ranges.items())
    ]
    return [Loop(function, _renamed(lines[first : last + 1])) for first, last in inner]


def _renamed(lines: Sequence[str]) -> list[str]:
    """Return the lines of a loop with its labels numbered, and what lies outside called so."""
    names = {line[:-1]: f".L{number}" for number, line in enumerate(line for line in lines if line.endswith(":"))}
    result = []
    for line in lines:
        words = line.split()
        if line.endswith(":"):
            result.append(f"{names[line[:-1]]}:")
        elif len(words) > 1 and _JUMP.match(words[0]):
            result.append(" ".join([*words[:-1], names.get(words[-1], "outside")]))
        else:
            result.append(line)
    return result


def _mnemonic(text: str) -> str:
    return text.split(" ", 1)[0]


def _width(text: str) -> int:
    return next((bits for bits, pattern in _REGISTERS.items() if pattern.search(text)), 32)


def _vector_width(text: str) -> int | None:
    """Return the width of a vector instruction; None of any other."""
    if _SCALAR.search(_mnemonic(text)) and not _BROADCAST.search(text):
        return None
    return next((bits for bits, pattern in _REGISTERS.items() if pattern.search(text)), None)


def _arithmetic(text: str) -> int:
    if _FUSED.match(text):
        return 0 if _SCALAR.search(_mnemonic(text)) and not _REGISTERS[128].search(text) else 2
    return 1 if _ARITHMETIC.match(_mnemonic(text)) else 0


def _is_store(text: str) -> bool:
    """Return whether an instruction writes memory: AT&T syntax names the target last, ARM's stores say so."""
    if not _MEMORY.search(text) or not _STORE.match(_mnemonic(text)):
        return False
    return _mnemonic(text).startswith("st") or text.rstrip().endswith((")", "}"))


def _is_load(text: str) -> bool:
    if not _MEMORY.search(text) or _mnemonic(text).startswith(("lea", "prefetch", "nop")):
        return False
    return not _is_store(text)
