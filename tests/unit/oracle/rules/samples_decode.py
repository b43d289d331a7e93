"""Samples of the rules about fetching, decoding and privilege."""

from __future__ import annotations

from emufuzz.case.build import DATA_BASE
from emufuzz.case.segments import segment_code
from tests.unit.oracle.rules.samples import GP0, NM, UD, Sample, fault

_TS = 0x8
_EM = 0x4
_CR0 = 0x80010033
_REAL0 = 0x32

# fmt: off
FETCH = (
    fault("gp-fetch-limit", GP0, "prot32", "b844332211", cs=segment_code(8, limit=0x6003)),
    fault("gp-fetch-canonical", GP0, "prot64", "b844332211", rip=0x7FFFFFFFFFFD),
    fault("pf-fetch", (14, 0x10, 0xB000), "prot64", "b8", rip=0xAFFF),
)

UNDEFINED = (
    fault("gp-too-long", GP0, "prot32", "66" * 15 + "90"),
    fault("ud-lock", UD, "prot64", "f089d8"),
    fault("ud-not-in-64-bit", UD, "prot64", "60"),
    fault("ud-mov-to-cs", UD, "prot32", "8ec8"),
    fault("ud-segment-number", UD, "prot32", "8ef0"),
    fault("ud-control-register", UD, "prot32", "0f22c8"),
    fault("ud-debug-register", UD, "prot64", "440f21c0"),
    fault("ud-debug-extensions", UD, "prot32", "0f21e0", cr4=0x608),
    fault("ud-ud2", UD, "real", "0f0b"),
    fault("ud-far-pointer-register", UD, "prot32", "0fb2c0"),
    fault("ud-lea-register", UD, "prot32", "8dc0"),
    fault("ud-group-pop", UD, "prot32", "8fc8"),
    fault("ud-group-inc-dec", UD, "prot32", "fed0"),
    fault("ud-group-bits", UD, "prot32", "0fbac001"),
    fault("ud-group-tables", UD, "prot32", "0f00f8"),
    fault("ud-cmpxchg8b-register", UD, "prot32", "0fc7c9"),
    fault("ud-non-temporal-register", UD, "prot32", "0fc3c0"),
    fault("ud-real-vm86", UD, "real", "0f00d8"),
    fault("ud-syscall", UD, "prot64", "0f05", efer=0xD00),
    fault("ud-swapgs", UD, "prot32", "0f01f8"),
    fault("ud-rsm", UD, "prot32", "0faa"),
    fault("ud-vmx-disabled", UD, "prot32", "0f78c0"),
    fault("ud-monitor", UD, "prot32", "0f01c8", cpl=3),
    fault("ud-xcr", UD, "prot32", "0f01d0"),
    fault("ud-sse-em", UD, "prot32", "0f28c1", cr0=_CR0 | _EM),
    fault("ud-sse-osfxsr", UD, "prot32", "0f28c1", cr4=0),
    fault("ud-mmx-em", UD, "prot32", "0f6fc1", cr0=_CR0 | _EM),
    fault("nm-sse", NM, "prot32", "0f28c1", cr0=_CR0 | _TS),
    fault("nm-mmx", NM, "prot32", "0f6fc1", cr0=_CR0 | _TS),
    fault("nm-x87", NM, "prot32", "d9c0", cr0=_CR0 | _TS),
    fault("nm-fxsave", NM, "prot32", "0fae03", cr0=_CR0 | _TS, rbx=DATA_BASE),
    fault("nm-wait", NM, "prot32", "9b", cr0=_CR0 | _TS),
    fault("ud-encoding", UD, "prot64", "c5e828c1"),
    fault("ud-opcode", UD, "prot32", "0f04"),
)

PRIVILEGE = (
    fault("gp-cpl-hlt", GP0, "prot32", "f4", cpl=3),
    fault("gp-cpl-cache", GP0, "prot64", "0f09", cpl=1),
    fault("gp-cpl-clts", GP0, "prot32", "0f06", cpl=3),
    fault("gp-cpl-lmsw", GP0, "prot32", "0f01f0", cpl=2),
    fault("gp-cpl-tables", GP0, "prot32", "0f0113", cpl=3, rbx=DATA_BASE),
    fault("gp-cpl-lldt-ltr", GP0, "prot32", "0f00d8", cpl=3),
    fault("gp-cpl-invlpg", GP0, "prot64", "0f013b", cpl=3, rbx=DATA_BASE),
    fault("gp-cpl-mov-cr", GP0, "prot64", "0f20c0", cpl=3),
    fault("gp-cpl-mov-dr", GP0, "prot64", "0f21c0", cpl=3),
    fault("gp-cpl-msr", GP0, "prot64", "0f32", cpl=3),
    fault("gp-cpl-xsetbv", GP0, "prot64", "0f01d1", cpl=3, cr4=0x40620, rax=3),
    fault("gp-cpl-swapgs", GP0, "prot64", "0f01f8", cpl=3),
    fault("gp-cpl-sysret", GP0, "prot64", "480f07", cpl=3),
    fault("gp-cpl-sysexit", GP0, "prot32", "0f35", cpl=3),
    fault("gp-cpl-invpcid", GP0, "prot64", "660f388203", cpl=3, rbx=DATA_BASE),
    fault("gp-real-sysenter", GP0, "real", "0f34"),
    fault("gp-tsd", GP0, "prot64", "0f31", cpl=3, cr4=0x624),
    fault("gp-pce", GP0, "prot64", "0f33", cpl=3),
    fault("gp-umip", GP0, "prot32", "0f0103", cpl=3, cr4=0xE00, rbx=DATA_BASE),
    fault("gp-iopl-cli-sti", GP0, "prot32", "fa", cpl=3),
    fault("gp-vm86-flags", GP0, "vm86", "9c"),
    fault("gp-vm86-int", GP0, "vm86", "cd10"),
    fault("gp-io-bitmap", GP0, "prot32", "ec", cpl=3, rdx=0x400),
)
# fmt: on

SAMPLES: tuple[Sample, ...] = (*FETCH, *UNDEFINED, *PRIVILEGE)
