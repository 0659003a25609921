"""PTX to C++, for the fibers of tests/cuda_shim: what the compilers made of the kernels, run on the
host. One PTX instruction becomes one call of machine.h; an instruction that is not known there, or
a combination of modifiers, is an error of the translation.

    from translate import translate
    source = translate(ptx_text)

`source` defines a function per kernel and enters it in the table of table.h.
"""

import re

from instructions import SIZES, TYPES, Instructions, UnknownInstruction, identifier

SPECIAL = {
    "%tid.x": "mdk::thread_index()",
    "%ntid.x": "mdk::thread_count()",
    "%ctaid.x": "mdk::block_index()",
    "%nctaid.x": "mdk::block_count()",
    "%laneid": "mdk::lane_index()",
    "%cluster_ctarank": "mdk::cluster_rank()",
    "%cluster_nctarank": "mdk::cluster_size()",
    **{f"%{name}.{axis}": "0" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "1" for name in ("ntid", "nctaid") for axis in "yz"},
}


def translate(text: str) -> str:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    module = Module(text)
    out = ['#include "machine.h"', *module.constants]
    out += [Function(*entry, module).source() for entry in module.entries]
    return "\n".join(out) + "\n"


class Module:
    def __init__(self, text: str):
        self.symbols, self.constants, self.entries = {}, [], []
        at = 0
        outside = ""
        for found in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
            outside += text[at : found.start()]
            at = end = found.end()
            depth = 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            threads = re.search(r"\.(?:max|req)ntid\s+(\d+)", found[3])
            self.entries.append((found[1], found[2], threads[1], text[at : end - 1]))
            at = end
        self.declare(re.sub(r"\.section\s+\.debug.*", "", outside + text[at:], flags=re.S))

    def declare(self, text: str) -> None:
        """Variables of a module: the dynamic shared memory at 0, and initialised bytes."""
        for space, kind, name, values in re.findall(
            r"\.(shared|global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\s*\[?[\w]*\]?"
            r"\s*(?:=\s*\{([^}]*)\})?\s*;",
            text,
        ):
            if space == "shared":
                self.symbols[name] = "uint64_t{0}"
            else:
                symbol = f"c_{identifier(name)}"
                self.symbols[name] = f"reinterpret_cast<uint64_t>({symbol})"
                self.constants.append(
                    f"alignas(16) static const {TYPES[kind]} {symbol}[] = {{{values}}};"
                )


class Function(Instructions):
    def __init__(self, name, parameters, threads, body, module):
        self.name, self.threads = name, threads
        self.symbol = f"k_{identifier(name)}"
        self.symbols = dict(module.symbols)
        self.offsets, offset = {}, 0
        for declaration in filter(None, map(str.strip, parameters.split(","))):
            kind = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)", declaration)
            found = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", declaration)
            size = SIZES[kind[2]] * int(found[2] or 1)
            align = int(kind[1] or SIZES[kind[2]])
            offset = -(-offset // align) * align
            self.offsets[found[1]] = (offset, size)
            self.symbols[found[1]] = f"reinterpret_cast<uint64_t>(parameters + {offset})"
            offset += size
        self.lines, self.kinds = [], {}
        for statement in statements(body):
            self.lines.append(self.statement(statement))

    def source(self) -> str:
        body = "\n".join(["(void)parameters;", *self.lines])
        table = ", ".join(f"{{{offset}, {size}}}" for offset, size in self.offsets.values())
        return (
            f"static void {self.symbol}(const char* parameters) {{\n{body}\n}}\n"
            f'static const ptx::Register r{self.symbol}("{self.name}", '
            f"{{{self.symbol}, {{{table}}}, {self.threads}}});"
        )

    def statement(self, text: str) -> str:
        if text in "{}":
            return text
        if text.endswith(":"):
            return f"{identifier(text[:-1])}:;"
        if text.startswith(".reg"):
            return self.registers(text)
        if text.startswith(".pragma"):
            return ""
        if text.startswith("."):
            raise UnknownInstruction(text)
        guard = re.match(r"@(!?)%(\w+)\s+", text)
        code = self.instruction(text[guard.end() :] if guard else text)
        return f"if ({guard[1]}v_{guard[2]}) {{ {code} }}" if guard else code

    def registers(self, text: str) -> str:
        kind, rest = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        names = []
        for one in map(str.strip, rest.split(",")):
            many = re.match(r"%?(\w+)<(\d+)>", one)
            names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [identifier(one)]
        storage = "bool" if kind == "pred" else f"uint{SIZES[kind] * 8}_t"
        self.kinds |= {f"%{name}": kind for name in names} | dict.fromkeys(names, kind)
        poison = "true" if kind == "pred" else f"{storage}(-1)"
        return " ".join(f"[[maybe_unused]] {storage} v_{name} = {poison};" for name in names)

    # ---- operands

    def read(self, kind: str, operand: str) -> str:
        """The operand as a C++ expression of the type."""
        ctype = TYPES[kind]
        if operand in SPECIAL:
            return f"{ctype}({SPECIAL[operand]})"
        if operand.startswith("!"):
            return f"!{self.read(kind, operand[1:])}"
        if operand.startswith("%") or (
            re.match(r"[a-z_]\w*$", operand) and (operand not in self.symbols)
        ):
            return f"rd<{ctype}>(v_{identifier(operand)})"
        if operand.startswith("0f"):
            return f"rd<{ctype}>(0x{operand[2:]}u)"
        if operand.startswith("0d"):
            return f"rd<{ctype}>(0x{operand[2:]}ull)"
        if operand in self.symbols:
            return f"{ctype}({self.symbols[operand]})"
        negative, digits = re.fullmatch(r"(-?)(\w+)", operand).groups()
        value = (int(digits.rstrip("U"), 0) * (-1 if negative else 1)) & (2**64 - 1)
        return f"bool({value & 1})" if kind == "pred" else f"rd<{ctype}>(uint64_t({value}ull))"

    def write(self, kind: str, operand: str, value: str) -> str:
        if operand == "_":
            return f"(void)({value});"
        return f"wr<{TYPES[kind]}>(v_{identifier(operand)}, {value});"

    def address(self, operand: str) -> str:
        base, _, offset = (x.strip() for x in operand.strip("[]").partition("+"))
        kind = "u64" if base in self.symbols else self.kinds[base]
        return f"uint64_t({self.read(kind, base)}) + int64_t({offset or 0})"


def statements(body: str) -> list[str]:
    out, at = [], 0
    while True:
        at = re.compile(r"\s*").match(body, at).end()
        if at == len(body):
            return out
        label = re.compile(r"[\w$]+:(?!:)").match(body, at)
        if label:
            end = label.end()
        elif body[at] in "{};":
            end = at + 1
        else:
            end = body.index(";", at) + 1
        text = " ".join(body[at:end].rstrip(";").split())
        if text:
            out.append(text)
        at = end
