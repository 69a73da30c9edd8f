# SPDX-License-Identifier: Apache-2.0
"""Translates the inline assembly of CUDA C into C++ calls of the emulator.

Only the instructions that generated kernels use are known; any other is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["UnknownInstructionError", "translate_assembly"]

# Constraint letters: C++ type of the register.
_REGISTERS = {"r": "uint32_t", "f": "float", "l": "uint64_t", "h": "uint16_t", "d": "double", "n": "int", "q": "int"}
# PTX types: C++ type, bytes.
_TYPES = {
    "pred": ("bool", 1),
    **{f"{kind}8": ("uint8_t", 1) for kind in "bus"},
    **{f"{kind}16": ("uint16_t", 2) for kind in "bus"},
    **{f"{kind}32": ("uint32_t", 4) for kind in "bus"},
    **{f"{kind}64": ("uint64_t", 8) for kind in "bus"},
    "f16": ("uint16_t", 2),
    "bf16": ("uint16_t", 2),
    "f16x2": ("uint32_t", 4),
    "bf16x2": ("uint32_t", 4),
    "f32": ("float", 4),
    "f64": ("double", 8),
}
# mma: (shape, type of A and B) to the row of kMmaShapes in machine.cpp.
_MMA = {
    ("m16n8k16", "f16"): 0,
    ("m16n8k16", "bf16"): 1,
    ("m16n8k8", "f16"): 2,
    ("m16n8k8", "bf16"): 3,
    ("m16n8k8", "tf32"): 4,
    ("m16n8k4", "tf32"): 5,
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
# Hints and fences that change no value here.
_IGNORED = ("griddepcontrol", "prefetch", "fence", "membar", "discard", "applypriority", "nanosleep")
# Type and count of what emulator_atomic_add takes.
_ADDITIONS = {
    "f32": (0, 1),
    "f64": (1, 1),
    "s32": (2, 1),
    "u32": (2, 1),
    "u64": (3, 1),
    "f16": (4, 1),
    "bf16": (5, 1),
    "f16x2": (4, 2),
    "bf16x2": (5, 2),
}


class UnknownInstructionError(ValueError):
    """An instruction that the emulator does not know."""


@dataclass
class _Statement:
    """One asm statement: operand names by number, and registers that its text declares."""

    operands: list[str]
    declared: dict[str, str] = field(default_factory=dict)

    def name(self, text: str) -> str:
        """Return the C++ expression of an operand."""
        text = text.strip()
        if match := re.fullmatch(r"%(\d+)", text):
            return self.operands[int(match[1])]
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uU]?", text):
            return text
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return f"emulator_bits<float>(0x{match[1]}u)"
        if text in self.declared:
            return self.declared[text]
        raise UnknownInstructionError(f"operand {text!r} is no operand of the statement and no register it declares.")

    def read(self, text: str, kind: str) -> str:
        return f"emulator_register<{_TYPES[kind][0]}>({self.name(text)})"

    def write(self, text: str, value: str) -> str:
        target = self.name(text)
        return f"{target} = emulator_register<std::remove_reference_t<decltype({target})>>({value});"

    def address(self, text: str, space: str) -> str:
        """Return a 64-bit address from "[register+offset]"."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text.strip())
        if match is None:
            raise UnknownInstructionError(f"address {text!r} has a form that is not emulated.")
        register = f"({self.name(match[1])} + {match[2] or 0})"
        if space == "shared":
            return f"uint64_t(emulator_shared_pointer(unsigned{register}))"
        return f"emulator_register64{register}"


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets, quotes and braces."""
    parts, depth, begin, quoted = [], 0, 0, False
    for index, letter in enumerate(text):
        if letter == '"' and text[index - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[begin:index])
            begin = index + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts]


def _vector(text: str) -> list[str]:
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]


def _space(words: list[str]) -> str:
    if any(word.startswith("shared") for word in words):
        return "shared"
    return "global"


def _ldmatrix(statement: _Statement, words: list[str], operands: list[str]) -> str:
    out, address = _vector(operands[0]), operands[1]
    count = next(int(word[1:]) for word in words if word in ("x1", "x2", "x4"))
    pointers = ", ".join(f"(unsigned*)&{statement.name(register)}" for register in out)
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", address)
    if match is None or len(out) != count:
        raise UnknownInstructionError(f"ldmatrix of {count} from {address!r} into {len(out)} registers.")
    at = f"unsigned({statement.name(match[1])}) + {match[2] or 0}"
    return (
        f"{{ unsigned* out[] = {{{pointers}}}; "
        f"emulator_load_matrix({count}, {int('trans' in words)}, out, {at}, __LINE__); }}"
    )


def _mma(statement: _Statement, words: list[str], operands: list[str]) -> str:
    shape = next(word for word in words if word.startswith("m16"))
    types = [word for word in words if word in ("f16", "bf16", "tf32", "f32")]
    if len(types) != 4 or types[0] != "f32" or types[3] != "f32" or (shape, types[1]) not in _MMA:
        raise UnknownInstructionError(f"mma.{'.'.join(words)} is not emulated.")
    if words.index("row") > words.index("col"):
        raise UnknownInstructionError("mma is emulated with A row and B column major only.")
    registers = [_vector(operand) for operand in operands]
    out = ", ".join(f"(unsigned*)&{statement.name(register)}" for register in registers[0])
    values = [statement.read(register, "b32") for group in registers[1:] for register in group]
    return (
        f"{{ unsigned* out[] = {{{out}}}; const unsigned in[] = {{{', '.join(values)}}}; "
        f"emulator_mma({_MMA[shape, types[1]]}, out, in, {len(values)}, __LINE__); }}"
    )


def _cp_async(statement: _Statement, words: list[str], operands: list[str]) -> str:
    if "commit_group" in words:
        return "emulator_commit_group();"
    if "wait_group" in words:
        return f"emulator_wait_group({statement.name(operands[0])});"
    if "wait_all" in words:
        return "emulator_wait_all();"
    if "bulk" in words or "mbarrier" in words:
        raise UnknownInstructionError(f"cp.async.{'.'.join(words)} is not emulated.")
    destination = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", operands[0])
    if destination is None:
        raise UnknownInstructionError(f"cp.async to {operands[0]!r}.")
    hints = any("cache_hint" in word for word in words)
    given = len(operands) - 2 - hints
    source_bytes = statement.name(operands[3]) if given == 2 else statement.name(operands[2])
    source = statement.address(operands[1], "global")
    return (
        f"emulator_copy_async(unsigned({statement.name(destination[1])}) + {destination[2] or 0}, "
        f"(const void*){source}, {statement.name(operands[2])}, int({source_bytes}), __LINE__);"
    )


def _addition(statement: _Statement, words: list[str], operands: list[str], returns: bool) -> str:
    if "add" not in words:
        raise UnknownInstructionError(f"atomic {'.'.join(words)} is not emulated.")
    kind = next((word for word in words if word in _ADDITIONS), None)
    if kind is None:
        raise UnknownInstructionError(f"atomic {'.'.join(words)} is not emulated.")
    number, count = _ADDITIONS[kind]
    values = _vector(operands[-1])
    out = _vector(operands[0]) if returns else []
    register = _TYPES[kind][0]
    code = f"{{ {register} in[] = {{{', '.join(statement.read(value, kind) for value in values)}}}; {register} old[8]; "
    address = statement.address(operands[-2], _space(words))
    code += f"emulator_atomic_add((void*){address}, in, {number}, {count * len(values)}, old, __LINE__); "
    code += " ".join(statement.write(name, f"old[{index}]") for index, name in enumerate(out))
    return code + " }"


def _load(statement: _Statement, words: list[str], operands: list[str]) -> str:
    kind = next(word for word in words if word in _TYPES)
    out = _vector(operands[0])
    code = f"{{ {_TYPES[kind][0]} value[{len(out)}]; "
    code += f"emulator_load(value, {statement.address(operands[1], _space(words))}, {len(out)}); "
    return code + " ".join(statement.write(name, f"value[{index}]") for index, name in enumerate(out)) + " }"


def _store(statement: _Statement, words: list[str], operands: list[str]) -> str:
    kind = next(word for word in words if word in _TYPES)
    values = ", ".join(statement.read(value, kind) for value in _vector(operands[1]))
    count = len(_vector(operands[1]))
    address = statement.address(operands[0], _space(words))
    return f"{{ {_TYPES[kind][0]} value[] = {{{values}}}; emulator_store(value, {address}, {count}); }}"


def _convert(statement: _Statement, words: list[str], operands: list[str]) -> str:
    target, source = words[-2], words[-1]
    if (target, source) == ("tf32", "f32") and "rna" in words:
        return statement.write(operands[0], f"emulator_tf32({statement.read(operands[1], 'f32')})")
    if source == "f32" and target in ("f16x2", "bf16x2") and "rn" in words:
        # The first source is the upper half.
        low, high = (statement.read(operand, "f32") for operand in (operands[2], operands[1]))
        kind = "half" if target == "f16x2" else "nv_bfloat16"
        packed = f"(uint32_t(emulator_bits<uint16_t>({kind}({high}))) << 16 | emulator_bits<uint16_t>({kind}({low})))"
        return statement.write(operands[0], packed)
    if source == "f32" and target in ("f16", "bf16"):
        kind = "half" if target == "f16" else "nv_bfloat16"
        value = f"emulator_bits<uint16_t>({kind}({statement.read(operands[1], 'f32')}))"
        return statement.write(operands[0], value)
    if target in ("u32", "u64") and source in ("u32", "u64"):
        return statement.write(operands[0], f"{_TYPES[target][0]}({statement.read(operands[1], source)})")
    raise UnknownInstructionError(f"cvt.{'.'.join(words)} is not emulated.")


def _move(statement: _Statement, words: list[str], operands: list[str]) -> str:
    if operands[1].startswith("%") and not operands[1][1:].isdigit():
        raise UnknownInstructionError(f"special register {operands[1]} is not emulated.")
    parts, source = _vector(operands[0]), _vector(operands[1])
    if len(parts) == len(source) == 1:
        return statement.write(operands[0], statement.read(operands[1], words[0]))
    bits = _TYPES[words[0]][1] * 8
    if len(source) > 1:
        step, piece = bits // len(source), {2: "b16", 4: "b8"}[len(source)] if bits == 32 else "b32"
        whole = _TYPES[words[0]][0]
        terms = [f"{whole}({statement.read(name, piece)}) << {index * step}" for index, name in enumerate(source)]
        return statement.write(operands[0], " | ".join(terms))
    step = bits // len(parts)
    kind = {8: "uint8_t", 16: "uint16_t", 32: "uint32_t"}[step]
    value = statement.read(operands[1], words[0])
    return " ".join(
        statement.write(name, f"{kind}({value} >> {index * step})") for index, name in enumerate(parts) if name != "_"
    )


def _compare(statement: _Statement, words: list[str], operands: list[str]) -> str:
    left, right = (statement.read(operand, words[-1]) for operand in operands[1:3])
    if words[-1].startswith("s"):
        left, right = f"int({left})", f"int({right})"
    return f"{statement.name(operands[0])} = {left} {_COMPARISONS[words[0]]} {right};"


def _arithmetic(operator: str) -> Callable[[_Statement, list[str], list[str]], str]:
    def translate(statement: _Statement, words: list[str], operands: list[str]) -> str:
        if words[-1] not in _TYPES or "hi" in words or "wide" in words:
            raise UnknownInstructionError(f"{operator} .{'.'.join(words)} is not emulated.")
        left, right = (statement.read(operand, words[-1]) for operand in operands[1:3])
        return statement.write(operands[0], f"({left} {operator} {right})")

    return translate


def _fma(statement: _Statement, words: list[str], operands: list[str]) -> str:
    if words[-1] != "f32":
        raise UnknownInstructionError(f"fma.{'.'.join(words)} is not emulated.")
    values = ", ".join(statement.read(operand, "f32") for operand in operands[1:4])
    return statement.write(operands[0], f"fmaf({values})")


def _cvta(statement: _Statement, words: list[str], operands: list[str]) -> str:
    if words[:2] != ["to", "shared"]:
        raise UnknownInstructionError(f"cvta.{'.'.join(words)} is not emulated.")
    pointer = f"(const void*)uint64_t({statement.name(operands[1])})"
    return statement.write(operands[0], f"uint64_t(emulator_shared_address({pointer}))")


def _barrier(statement: _Statement, words: list[str], operands: list[str]) -> str:
    if "sync" not in words or operands[:1] not in ([], ["0"]) or len(operands) > 1:
        raise UnknownInstructionError(f"barrier {operands} is not emulated.")
    return "emulator_barrier(__LINE__);"


_TRANSLATORS: dict[str, Callable[[_Statement, list[str], list[str]], str]] = {
    "ldmatrix": _ldmatrix,
    "mma": _mma,
    "cp": _cp_async,
    "red": lambda statement, words, operands: _addition(statement, words, operands, returns=False),
    "atom": lambda statement, words, operands: _addition(statement, words, operands, returns=True),
    "ld": _load,
    "st": _store,
    "cvt": _convert,
    "mov": _move,
    "setp": _compare,
    "fma": _fma,
    "cvta": _cvta,
    "bar": _barrier,
    "barrier": _barrier,
    **{name: _arithmetic(operator) for name, operator in _ARITHMETIC.items()},
}


def _declare(statement: _Statement, text: str) -> str:
    """Translate ".reg .b32 a, b;" into variables."""
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
    if match is None or match[1] not in _TYPES:
        raise UnknownInstructionError(f"declaration {text!r} is not emulated.")
    kind = _TYPES[match[1]][0]
    names = []
    for name in match[2].split(","):
        name = name.strip()
        numbered = re.fullmatch(r"(.+)<(\d+)>", name)
        names += [f"{numbered[1]}{index}" for index in range(int(numbered[2]))] if numbered else [name]
    for name in names:
        statement.declared[name] = "register_" + re.sub(r"\W", "_", name)
    return " ".join(f"{kind} {statement.declared[name]} = 0;" for name in names)


def _instruction(statement: _Statement, text: str) -> str:
    text = text.strip()
    while text.startswith("{") or text.startswith("}"):
        text = text[1:].strip()
    if not text:
        return ""
    if text.startswith("."):
        return _declare(statement, text)
    predicate = ""
    if match := re.match(r"@(!?)\s*([%\w]+)\s+", text):
        predicate = f"if ({match[1]}{statement.name(match[2])}) "
        text = text[match.end() :]
    # A type before the operand's brace is part of the opcode: "ldmatrix...b16{%0, ...}".
    match = re.match(r"[\w.:]+", text)
    if match is None:
        raise UnknownInstructionError(f"{text!r} is not an instruction.")
    opcode, rest = match[0].replace("::cta", "").replace("::", ":"), text[match.end() :].strip()
    first, *words = opcode.split(".")
    if first in _IGNORED:
        return ""
    if first not in _TRANSLATORS:
        raise UnknownInstructionError(f"PTX instruction {opcode!r} is not emulated.")
    operands = _split(rest, ",") if rest else []
    return f"{predicate}{{ {_TRANSLATORS[first](statement, words, operands)} }}"


def _literals(text: str) -> str:
    """Return the text of adjacent string literals."""
    pieces = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    return "".join(pieces).replace("\\n", "\n").replace("\\t", " ").replace('\\"', '"')


def translate_assembly(text: str) -> str:
    """Return C++ for what stands between the brackets of an asm statement.

    Parameters
    ----------
    text : str
        The template's string literals and, separated by colons, outputs, inputs and clobbers.

    Raises
    ------
    UnknownInstructionError
        If the template holds an instruction that is not emulated.
    """
    template, *sections = _split(text, ":")
    code, operands = [], []
    for number, section in enumerate(sections[:2]):
        for operand in _split(section, ",") if section else []:
            match = re.fullmatch(r'"([^"]*)"\s*\((.*)\)', operand, re.DOTALL)
            if match is None:
                raise UnknownInstructionError(f"operand {operand!r} of an asm statement.")
            constraint, expression = match[1], match[2]
            name = f"operand{len(operands)}"
            if number == 0:
                code.append(f"auto& {name} = {expression};")
            else:
                if constraint.isdigit():
                    code.append(f"{operands[int(constraint)]} = {expression};")
                    name = operands[int(constraint)]
                else:
                    kind = _REGISTERS[constraint]
                    value = f"emulator_register64({expression})" if kind == "uint64_t" else f"({expression})"
                    code.append(f"{kind} {name} = {value};")
            operands.append(name)
    statement = _Statement(operands)
    body = re.sub(r"//[^\n]*", "", _literals(template))
    code += [_instruction(statement, part) for part in body.split(";")]
    return "{ " + " ".join(part for part in code if part).replace("\n", " ") + " }"
