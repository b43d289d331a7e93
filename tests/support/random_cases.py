"""Random machine states and instructions, far from ordinary ones, for tests of robustness."""

from __future__ import annotations

from random import Random

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.modes import MODES
from emufuzz.case.build import DATA_BASE, GDT_BASE, LDT_BASE, STACK_TOP, build_memory, build_system, cpls_of
from emufuzz.case.model import Case, Fpu, Memory, Segment, System, TableRegister
from emufuzz.case.values import boundary
from emufuzz.fuzz.forms import MOD_MEMORY, MOD_REGISTER, Form, forms

MASK64 = 0xFFFFFFFFFFFFFFFF
PREFIXES = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
MSRS = (0x10, 0x140, 0x174, 0x175, 0x176, *range(0xC0000081, 0xC0000085), 0xC0000102, 0xC0000103)
CR0_BITS = cr.X86_CR0_TS | cr.X86_CR0_EM | cr.X86_CR0_AM | cr.X86_CR0_WP
CR4_BITS = 0x711FF | cr.X86_CR4_OSFXSR | cr.X86_CR4_UMIP | cr.X86_CR4_OSXSAVE
LIMITS = (0, 7, 0xFF, 0x7FFF, 0x8FFF, 0xFFFF, 0xFFFFF)
RFLAGS_BITS = 0x3D7FD5  # all that exist but VM
#: Where pointers of random states lead: pages that exist, their ends, and some that do not.
PLACES = (0x6000, DATA_BASE, DATA_BASE + 0xFF8, 0x9FFF, 0xAFFC, 0xB000, STACK_TOP, 0xFFFF, GDT_BASE, LDT_BASE)


def random_segment(rng: Random, seg: Segment) -> Segment:
    """A segment register changed in one of its hidden parts, or made unusable."""
    kind = rng.randrange(8)
    if kind == 0:
        return Segment(sel=seg.sel)
    if kind == 1:
        return msgspec.structs.replace(seg, type=rng.randrange(16))
    if kind == 2:
        return msgspec.structs.replace(seg, limit=rng.choice(LIMITS), g=0)
    if kind == 3:
        return msgspec.structs.replace(seg, base=boundary(rng, 64))
    if kind == 4:
        return msgspec.structs.replace(seg, db=rng.randrange(2))
    return seg


def random_system(rng: Random, mode: str) -> System:
    system = build_system(mode, rng.choice(cpls_of(mode)))
    seg = tuple(
        random_segment(rng, s) if i != 1 or not rng.randrange(4) else s for i, s in enumerate(system.seg)
    )
    change = rng.getrandbits(64) if rng.randrange(2) else 0
    fpu = Fpu(
        fcw=rng.choice((0x37F, 0, 0xFFFF)), fsw=rng.choice((0, 0x3800, 0xFFFF)), ftw=rng.randrange(256),
        xmm=tuple(rng.getrandbits(128) for _ in range(16)), mm=tuple(rng.getrandbits(64) for _ in range(8)),
    )  # fmt: skip
    return msgspec.structs.replace(
        system,
        seg=seg,
        gdtr=TableRegister(GDT_BASE, rng.choice((0, 0x1F, 0xFFF, 0xFFF, 0xFFFF))),
        cr0=system.cr0 ^ change & CR0_BITS,
        cr4=system.cr4 ^ change & CR4_BITS if rng.randrange(2) else system.cr4,
        efer=system.efer | rng.choice((0, cr.EFER_SCE, cr.EFER_SVME)),
        dr=tuple(rng.choice((value, rng.getrandbits(32))) for value in system.dr),
        msr=tuple((index, boundary(rng, 64)) for index in MSRS),
        fpu=fpu,
    )


def random_descriptors(rng: Random, count: int) -> bytes:
    """Descriptors with plausible fields, present more often than not."""
    return b"".join(
        DescStruct(
            rng.choice(PLACES), rng.choice(LIMITS), rng.randrange(16), rng.randrange(4) > 0, rng.randrange(4),
            rng.randrange(8) > 0, 0, rng.randrange(2), rng.randrange(2), rng.randrange(2),
        ).pack()
        for _ in range(count)
    )  # fmt: skip


def random_memory(rng: Random, mode: str, system: System) -> Memory:
    words = b"".join(boundary(rng, 64).to_bytes(8, "little") for _ in range(512))
    data = {
        DATA_BASE: words,
        0x9000: rng.randbytes(4096),
        0xC000: words[::-1],
        LDT_BASE: random_descriptors(rng, 16),
    }
    if mode == "real" or rng.randrange(2):
        data[GDT_BASE] = bytes(8) + random_descriptors(rng, 511)
    if mode == "real":
        data[0] = bytes(range(256)) * 4
    return build_memory(mode, system, data)


class RandomCases:
    """An endless supply of cases, reproducible from a seed.

    States are made in advance, `states` of them, and shared; registers and instructions are fresh.
    Half of the instructions are encodings of implemented leaves, the others random bytes.
    """

    def __init__(self, seed: int, states: int = 64) -> None:
        self.rng = rng = Random(seed)
        self.states = []
        for i in range(states):
            mode = MODES[i % len(MODES)]
            system = random_system(rng, mode)
            self.states.append((mode, system, random_memory(rng, mode, system)))
        self.forms = [form for form in forms() if form.implemented]

    def register(self) -> int:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            return boundary(rng, 64)
        if kind == 1:
            return rng.randrange(64)
        return rng.choice(PLACES) + rng.randrange(-4, 16)

    def code(self, form: Form | None) -> bytes:
        return encode(self.rng, form) if form is not None else self._bytes()

    def _bytes(self) -> bytes:
        rng = self.rng
        prefixes = bytes(rng.choice(PREFIXES) for _ in range(rng.choice((0, 0, 1, 2))))
        return (prefixes + rng.choice((b"", b"", b"\x0f")) + rng.randbytes(15))[:15]

    def case(self) -> Case:
        rng = self.rng
        mode, system, mem = rng.choice(self.states)
        form = rng.choice(self.forms) if rng.randrange(2) else None
        return Case(
            id="",
            mode=mode,
            code=self.code(form),
            gpr=tuple(self.register() & MASK64 for _ in range(16)),
            rip=rng.choice((0x6000, 0x6000, 0x6000, 0x6FFC, boundary(rng, 64))),
            rflags=rng.getrandbits(22) & RFLAGS_BITS | 2 | (0x20000 if mode == "vm86" else 0),
            system=system,
            mem=mem,
            vendor=rng.choice(("intel", "amd")),
        )


def encode(rng: Random, form: Form) -> bytes:
    """Bytes of a leaf: mandatory and other prefixes, opcode, ModRM that fits, random bytes behind."""
    head = [rng.choice(PREFIXES) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    if form.prefix:
        head = [byte for byte in head if byte not in (0x66, 0xF2, 0xF3)]
        head += {"no": [], "66": [0x66], "f2": [0xF2], "f3": [0xF3]}[form.prefix]
    if form.mode64 is not False and not rng.randrange(3):
        head.append(0x40 | rng.randrange(16))
    modrm = rng.randrange(256)
    if form.reg >= 0:
        modrm = modrm & ~0x38 | form.reg << 3
    if form.rm >= 0:
        modrm = modrm & ~7 | form.rm
    if form.mod == MOD_REGISTER:
        modrm |= 0xC0
    elif form.mod == MOD_MEMORY and modrm >= 0xC0:
        modrm ^= rng.choice((0x40, 0x80, 0xC0))
    modrm_bytes = bytes((modrm,)) if form.has_modrm else b""
    return (bytes(head) + form.opcode + modrm_bytes + rng.randbytes(15))[:15]
