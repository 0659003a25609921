"""PTX to C++, for the fibers of tests/cuda_shim: what the compilers made of the kernels, run on the
host. One PTX instruction becomes one call of machine.h; an instruction that is not known there, or
a combination of modifiers, is an error of the translation.

    from translate import translate
    source = translate(ptx_text)

`source` defines a function per kernel and enters it in the table of table.h.
"""

import re

SIZES = {"pred": 1, "f16x2": 4, "bf16x2": 4} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)
}
TYPES = {"pred": "bool", "f32": "float", "f64": "double", "f16x2": "uint32_t", "bf16x2": "uint32_t"}
TYPES |= {f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)}
TYPES |= {"f16": "half", "bf16": "bfloat"}
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
HINTS = re.compile(  # what decides where a value is kept, not which value it is
    r"\.(nc|volatile|weak|relaxed|acquire|release|acq_rel|cta|gpu|sys|cg|ca|cs|cv|wb|wt"
    r"|L1::\w+|L2::\w+|full|approx|uni|aligned)(?![\w:])"
)


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


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


class Function:
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
            raise NotImplementedError(text)
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

    # ---- instructions

    def instruction(self, text: str) -> str:
        op, _, rest = text.partition(" ")
        operands = split(rest)
        root, *modifiers = HINTS.sub("", op).split(".")
        handler = getattr(self, f"op_{root}", None)
        if handler is not None:
            code = handler(modifiers, operands)
        else:
            code = self.plain(root, modifiers, operands)
        if code is None:
            raise NotImplementedError(text)
        return code

    def plain(self, root, modifiers, operands):
        """d = root<modifiers>(a, b, ...), all of one type: `root_mod(T a, ...)` in machine.h."""
        *rounding, kind = modifiers
        name = "_".join([root, *(m for m in rounding if m not in ("rn", "lo"))])
        values = ", ".join(self.read(kind, x) for x in operands[1:])
        return self.write(kind, operands[0], f"op_{name}<{TYPES[kind]}>({values})")

    def wide(self, root, modifiers, operands):
        if modifiers[0] != "wide":
            return self.plain(root, modifiers, operands)
        kind = modifiers[1]
        double = f"{kind[0]}{int(kind[1:]) * 2}"
        values = [f"{TYPES[double]}({self.read(kind, x)})" for x in operands[1:3]]
        values += [self.read(double, x) for x in operands[3:]]
        return self.write(double, operands[0], f"op_{root}<{TYPES[double]}>({', '.join(values)})")

    def op_mul(self, modifiers, operands):
        return self.wide("mul", modifiers, operands)

    def op_mad(self, modifiers, operands):
        return self.wide("mad", modifiers, operands)

    def shift(self, root, modifiers, operands):
        kind = modifiers[-1]
        a, b = self.read(kind, operands[1]), self.read("u32", operands[2])
        return self.write(kind, operands[0], f"op_{root}<{TYPES[kind]}>({a}, {b})")

    def op_shl(self, modifiers, operands):
        return self.shift("shl", modifiers, operands)

    def op_shr(self, modifiers, operands):
        return self.shift("shr", modifiers, operands)

    def op_bfe(self, modifiers, operands):
        kind = modifiers[-1]
        a = self.read(kind, operands[1])
        b, c = (self.read("u32", x) for x in operands[2:])
        return self.write(kind, operands[0], f"op_bfe<{TYPES[kind]}>({a}, {b}, {c})")

    def counting(self, root, modifiers, operands):
        kind = modifiers[-1]
        value = f"op_{root}<{TYPES[kind]}>({self.read(kind, operands[1])})"
        return self.write("u32", operands[0], value)

    def op_popc(self, modifiers, operands):
        return self.counting("popc", modifiers, operands)

    def op_clz(self, modifiers, operands):
        return self.counting("clz", modifiers, operands)

    def op_shf(self, modifiers, operands):
        direction, mode, kind = modifiers
        values = ", ".join(self.read(kind, x) for x in operands[1:])
        return self.write(kind, operands[0], f"op_shf_{direction}_{mode}({values})")

    def op_lop3(self, modifiers, operands):
        values = ", ".join(self.read("b32", x) for x in operands[1:])
        return self.write("b32", operands[0], f"op_lop3({values})")

    def op_setp(self, modifiers, operands):
        compare, *combine, kind = modifiers
        destination, a, b, *c = operands
        test = f"compare_{compare}<{TYPES[kind]}>({self.read(kind, a)}, {self.read(kind, b)})"
        if combine:
            sign = {"and": "&", "or": "|", "xor": "^"}[combine[0]]
            test = f"bool({test} {sign} {self.read('pred', c[0])})"
        if not kind.endswith("x2"):
            return self.write("pred", destination, test)
        if combine:
            return None
        low, high = destination.split("|")
        pair = [
            f"compare_{compare}<float>({self.element(kind, a, i)}, {self.element(kind, b, i)})"
            for i in (0, 1)
        ]
        return self.write("pred", low, pair[0]) + self.write("pred", high, pair[1])

    def element(self, kind: str, operand: str, index: int) -> str:
        """One of a packed pair of halves, as a float."""
        half = TYPES[kind.removesuffix("x2")]
        value = self.read("u32", operand)
        return f"convert_rn<float>({half}{{uint16_t({value} >> {16 * index})}})"

    def op_selp(self, modifiers, operands):
        kind = modifiers[-1]
        d, a, b, p = operands
        values = f"{self.read(kind, a)} : {self.read(kind, b)}"
        return self.write(kind, d, f"{self.read('pred', p)} ? {values}")

    def op_mov(self, modifiers, operands):
        kind, (d, a) = modifiers[-1], operands
        if a.startswith("{"):
            parts = split(a[1:-1])
            half = f"u{SIZES[kind] * 8 // len(parts)}"
            values = ", ".join(self.read(half, x) for x in parts)
            return self.write(kind, d, f"pack<{TYPES[kind]}>({values})")
        if d.startswith("{"):
            parts = split(d[1:-1])
            half = f"u{SIZES[kind] * 8 // len(parts)}"
            shift = SIZES[kind] * 8 // len(parts)
            whole = self.read(kind, a)
            return "".join(
                self.write(half, x, f"{TYPES[half]}({whole} >> {i * shift})")
                for i, x in enumerate(parts)
            )
        return self.write(kind, d, self.read(kind, a))

    def op_cvt(self, modifiers, operands):
        *how, to, of = modifiers
        if to in ("f16x2", "bf16x2"):
            high, low = (self.read(of, x) for x in operands[1:])
            return self.write(to, operands[0], f"convert_{to}({low}, {high})")
        rounding = "_".join(m for m in how if m not in ("rn", "ftz")) or "rn"
        value = self.read(of, operands[1])
        name = f"convert_{rounding}<{TYPES[to]}>({value})"
        return self.write(to, operands[0], name)

    def op_cvta(self, modifiers, operands):
        *_, space, kind = modifiers
        value = self.read(kind, operands[1])
        if space == "shared":
            value = f"to_shared({value})" if "to" in modifiers else f"from_shared({value})"
        return self.write(kind, operands[0], value)

    def op_mapa(self, modifiers, operands):
        values = f"{self.read('u64', operands[1])}, {self.read('u32', operands[2])}"
        return self.write("u64", operands[0], f"op_mapa({values})")

    # ---- memory

    def place(self, modifiers, operand):
        """(C++ pointer expression of the access, number of elements, type)"""
        *where, kind = modifiers
        count = next((int(m[1:]) for m in where if re.fullmatch(r"v\d", m)), 1)
        space = [m for m in where if not re.fullmatch(r"v\d", m)] or ["generic"]
        space = space[0].partition("::")[0]
        if space not in ("global", "shared", "param", "generic", "const"):
            raise NotImplementedError(f"space {space} of {operand}")
        base = "param" if space == "param" else "shared" if space == "shared" else "global"
        return f"{base}_at<{TYPES[kind]}, {count}>({self.address(operand)})", count, kind

    def op_ld(self, modifiers, operands):
        pointer, _, kind = self.place(modifiers, operands[1])
        names = split(operands[0][1:-1]) if operands[0].startswith("{") else [operands[0]]
        writes = "".join(self.write(kind, x, f"at[{i}]") for i, x in enumerate(names))
        # All elements are read before a register is written: the address may be one of them.
        return (
            f"{{ const auto* from = {pointer}; {TYPES[kind]} at[{len(names)}];"
            f" std::memcpy(at, from, sizeof at); {writes} }}"
        )

    def op_st(self, modifiers, operands):
        pointer, _, kind = self.place(modifiers, operands[0])
        names = split(operands[1][1:-1]) if operands[1].startswith("{") else [operands[1]]
        values = ", ".join(self.read(kind, x) for x in names)
        return (
            f"{{ const {TYPES[kind]} at[] = {{{values}}}; std::memcpy({pointer}, at, sizeof at); }}"
        )

    def op_atom(self, modifiers, operands):
        space, operation, kind = modifiers
        pointer, _, _ = self.place([space, kind], operands[1])
        values = ", ".join([pointer, *(self.read(kind, x) for x in operands[2:])])
        return self.write(kind, operands[0], f"atomic_{operation}<{TYPES[kind]}>({values})")

    def op_red(self, modifiers, operands):
        return self.op_atom(modifiers, ["_", *operands])

    def op_cp(self, modifiers, operands):
        what = ".".join(modifiers)
        if what == "async.shared.global":
            to, of = self.address(operands[0]), self.address(operands[1])
            return f"copy_async({to}, {of});" if operands[2] == "16" else None
        if what == "async.commit_group":
            return "mdk::copy_async_commit();"
        if what == "async.wait_group":
            return f"mdk::copy_async_wait<{operands[0]}>();"
        if what == "async.bulk.prefetch.L2.global":
            size = self.read("u32", operands[1])
            return f"prefetch({self.address(operands[0])}, {size});"
        return None

    def op_createpolicy(self, modifiers, operands):
        return self.write("b64", operands[0], "uint64_t(0)")

    def op_ldmatrix(self, modifiers, operands):
        if modifiers != ["sync", "m8n8", "x4", "shared", "b16"]:
            return None
        names = ", ".join(f"v_{identifier(x)}" for x in split(operands[0][1:-1]))
        return f"load_matrices({self.address(operands[1])}, {names});"

    # ---- control, barriers, warps

    def op_bra(self, modifiers, operands):
        return f"goto {identifier(operands[0])};"

    def op_ret(self, modifiers, operands):
        return "return;"

    op_exit = op_ret

    def op_trap(self, modifiers, operands):
        return 'trap("trap");'

    def op_bar(self, modifiers, operands):
        if modifiers == ["sync"] and operands == ["0"]:
            return "mdk::block_sync();"
        return f"warp_sync({self.read('u32', operands[0])});" if modifiers[0] == "warp" else None

    def op_barrier(self, modifiers, operands):
        if modifiers == ["sync"] and operands == ["0"]:
            return "mdk::block_sync();"
        return {
            ("cluster", "arrive"): "mdk::shim::self->arrived = true;",
            ("cluster", "wait"): "cluster_wait();",
        }.get(tuple(modifiers))

    def op_membar(self, modifiers, operands):
        return ""

    op_fence = op_membar

    def op_shfl(self, modifiers, operands):
        _, mode, kind = modifiers
        d, a, *rest = operands
        d, _, inside = d.partition("|")
        values = ", ".join([self.read(kind, a), *(self.read("u32", x) for x in rest)])
        code = f"const auto got = shuffle_{mode}({values}); {self.write(kind, d, 'got.value')}"
        if inside:
            code += self.write("pred", inside, "got.inside")
        return f"{{ {code} }}"

    def op_vote(self, modifiers, operands):
        if modifiers != ["sync", "ballot", "b32"]:
            return None
        values = f"{self.read('pred', operands[1])}, {self.read('u32', operands[2])}"
        return self.write("b32", operands[0], f"vote_ballot({values})")

    def op_redux(self, modifiers, operands):
        _, operation, kind = modifiers
        values = f"{self.read(kind, operands[1])}, {self.read('u32', operands[2])}"
        return self.write(kind, operands[0], f"redux_{operation}<{TYPES[kind]}>({values})")


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


def split(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,])+", text) if x.strip()]
