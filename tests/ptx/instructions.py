"""One PTX instruction as a call of machine.h: which function, and its operands by their type.

A handler op_<root> gets the modifiers without hints, the last of them usually the type, and the
operands as text; it returns C++, or None for a combination it does not know. Without a handler it
is d = root(a, b, ...) of one type.
"""

import re

SIZES = {"pred": 1, "f16x2": 4, "bf16x2": 4} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)
}
TYPES = {"pred": "bool", "f32": "float", "f64": "double", "f16x2": "uint32_t", "bf16x2": "uint32_t"}
TYPES |= {f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)}
TYPES |= {"f16": "half", "bf16": "bfloat"}
HINTS = re.compile(  # what decides where a value is kept, not which value it is
    r"\.(nc|volatile|weak|relaxed|acquire|release|acq_rel|cta|gpu|sys|cg|ca|cs|cv|wb|wt"
    r"|L1::\w+|L2::\w+|full|approx|uni|aligned)(?![\w:])"
)


class UnknownInstruction(ValueError):
    """PTX that machine.h has no function for."""


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


def split(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,])+", text) if x.strip()]


class Instructions:
    """Of a function, which has `read(type, operand)`, `write(type, operand, value)` and
    `address(operand)`, all C++ text."""

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
            raise UnknownInstruction(text)
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
            raise UnknownInstruction(f"space {space} of {operand}")
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
