"""How cases of each path are made: a scene, a choice of instructions, and a finish.

A recipe lists the kinds of scenes and instructions that lead into its path, with their shares, and
in `finish` what the path needs beyond that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_SREG_TR
from emufuzz.arch.rflags import X86_EFLAGS_IOPL
from emufuzz.case.arena import ARENA_BASE
from emufuzz.case.model import Case, Memory
from emufuzz.fuzz.environments import EDGE_END, Environment
from emufuzz.fuzz.kvm.direct import MSR_CODES, direct_exit, msr_access, msr_filter, msr_operands
from emufuzz.fuzz.kvm.physical import TABLES, physical_scene
from emufuzz.fuzz.kvm.scenes import Scene, aimed, data_pages, device_scene, mmio, port_devices
from emufuzz.fuzz.kvm.spice import SHARE, lapic_registers, with_priority
from emufuzz.fuzz.kvm.states import event, invalid_scene, ivt_scene, several_instructions
from emufuzz.fuzz.kvm.tasks import task_scene, task_switch

Kvm: TypeAlias = dict[str, Any]
MakeScene: TypeAlias = Callable[[Random, Environment], Scene]
Finish: TypeAlias = Callable[[Random, Scene, Case, Kvm], Case]

FORCED: Final = b"\x0f\x0bkvm"
_APIC: Final = 0xFEE00000
_TSS, _TSS_LIMIT, _IO_BITMAP = 0x1800, 0x7FF, 0x68
_GUEST_MAXPHYADDR: Final = 36
_LOG_DIRTY, _READONLY = 1, 2
_TABLE_FRAMES: Final = range(TABLES >> 12, (TABLES >> 12) + 256)
#: Environments whose data segments reach all of 32 bits.

_NARROW: Final = ("small", "expand-down")


class Recipe(NamedTuple):
    """How to make cases of a path.

    `scenes` and `kinds` (of `select.KINDS`) are picked from with equal chances; `modes` are those in
    which the path exists, `usable` tells of which environments; `spice` is the share of seasoned cases.
    """

    scenes: tuple[MakeScene, ...]
    kinds: tuple[str, ...]
    finish: tuple[Finish, ...] = ()
    modes: tuple[str, ...] = MODES
    usable: Callable[[Environment], bool] = lambda _: True
    spice: float = SHARE


# -- scenes --------------------------------------------------------------------------------------


def plain_scene(rng: Random, env: Environment) -> Scene:
    """The environment as it is, and ports, which a bitmap in the TSS allows, perhaps."""
    pio, ports = port_devices(rng)
    if env.mem.entries[-1][0] == _TSS and (env.mode == "vm86" or rng.random() < 0.3):
        env = _with_io_bitmap(rng, env)
    return Scene(env, {"devices": pio} if pio else {}, ports=ports)


def _with_io_bitmap(rng: Random, env: Environment) -> Environment:
    """A TSS with a bit per port behind it, up to port 0x3cbf; some ports are denied."""
    seg = list(env.system.seg)
    seg[VCPU_SREG_TR] = msgspec.structs.replace(seg[VCPU_SREG_TR], limit=_TSS_LIMIT)
    bitmap = _IO_BITMAP.to_bytes(2, "little")
    entries = [*env.mem.entries, (_TSS + 0x66, bitmap), (_TSS + _IO_BITMAP + rng.randrange(0x100), b"\xff")]
    system = msgspec.structs.replace(env.system, seg=tuple(seg))
    return dataclasses.replace(env, system=system, mem=Memory(tuple(entries)))


def slot_scene(rng: Random, env: Environment) -> Scene:
    """Memory in slots, some of them read-only or logged, one page a device."""
    scene = device_scene(rng, env)
    pages = [*scene.env.mem.pages, *range(ARENA_BASE >> 12, EDGE_END >> 12)]
    data = [page >> 12 for page in data_pages(env)]
    slots, spots = [], []
    for pfn in pages:
        if pfn >> 40:
            continue
        flags = rng.choice((_READONLY, _READONLY, _READONLY | _LOG_DIRTY, _LOG_DIRTY)) if pfn in data else 0
        flags |= rng.choice((0, 0, 0, _LOG_DIRTY))
        slots.append({"base": pfn << 12, "size": 4096, "flags": flags})
        if flags & _READONLY:
            spots += [(pfn << 12) + rng.randrange(4096) for _ in range(8)]
    env = aimed(rng, scene.env, (*scene.spots[: len(spots)], *spots), 0.96)
    return dataclasses.replace(scene, env=env, kvm={"memslots": slots})


def unpaged_scene(rng: Random, env: Environment) -> Scene:
    """Devices without paging, as shadow paging has no hidden tables."""
    system = env.system
    if system.cr0 & cr.X86_CR0_PG:
        if system.efer & cr.EFER_LMA:
            return tables_scene(rng, env)
        env = dataclasses.replace(
            env, system=msgspec.structs.replace(system, cr0=system.cr0 & ~cr.X86_CR0_PG)
        )
    return rng.choice((device_scene, slot_scene))(rng, env)


def tables_scene(rng: Random, env: Environment) -> Scene:
    """Page tables that the guest writes to, one in three times; damage mostly gives it #PF of its own."""
    return physical_scene(rng, env, table_share=0.35, damaged=0.12)


def physical_slot_scene(rng: Random, env: Environment) -> Scene:
    """Page tables in slots of which some are read-only or logged."""
    scene = physical_scene(rng, env)
    pages = {int(entry["addr"], 16) >> 12 for entry in scene.extra["phys"]} | set(range(0x40, 0x50))
    tables = 0.5 if rng.random() < 0.15 else 0.0
    slots = []
    for pfn in sorted(pages):
        flags = _READONLY if rng.random() < (tables if pfn in _TABLE_FRAMES else 0.3) else 0
        slots.append({"base": pfn << 12, "size": 4096, "flags": flags | rng.choice((0, 0, 0, _LOG_DIRTY))})
    return dataclasses.replace(scene, kvm={**scene.kvm, "memslots": slots})


def memory_scene(rng: Random, env: Environment) -> Scene:
    """Page tables and no MMIO."""
    return physical_scene(rng, env, devices=False)


def sound_scene(rng: Random, env: Environment) -> Scene:
    """Page tables that let the instruction come to its exit."""
    return physical_scene(rng, env, sound=True)


def apic_scene(rng: Random, env: Environment) -> Scene:
    """Addresses on the local APIC's page; behind page tables one in three times."""
    spots = [_APIC + 16 * rng.randrange(0x40) + rng.choice((0, 0, 0, 0, 4, 1)) for _ in range(24)]
    spots += [
        _APIC + offset
        for offset in (0x20, 0x30, 0x80, 0xB0, 0xB0, 0xD0, 0xF0, 0x300, 0x310, 0x320, 0x380, 0x390)
    ]
    spots += [_APIC + 0xFFE, _APIC + 0xFF8] + [_APIC - 2] * (rng.random() < 0.2)
    if env.mode != "real" and rng.random() < 0.33:
        return _apic_behind_tables(rng, env)
    registers = lapic_registers(rng)
    env = dataclasses.replace(env, system=with_priority(env.system, registers))
    return Scene(aimed(rng, env, tuple(spots), 0.99), {}, {"lapic": registers})


def _apic_behind_tables(rng: Random, env: Environment) -> Scene:
    scene = physical_scene(rng, env, frames=_APIC, table_share=0)
    extra, registers = {"phys": scene.extra["phys"]}, lapic_registers(rng)
    env = dataclasses.replace(scene.env, system=with_priority(scene.env.system, registers))
    return dataclasses.replace(scene, env=env, extra=extra, kvm={**scene.kvm, "lapic": registers})


def far_scene(rng: Random, env: Environment) -> Scene:
    """A page or device beyond the guest's MAXPHYADDR, which the host has."""
    page = _far_page(rng)
    extra: dict[str, Any] = {}
    entries = [*env.mem.entries[-2:]]
    if rng.random() < 0.5:
        extra["devices"] = [mmio(rng, page, rng.choice((4096, 64)))]
    else:
        entries.append((page, rng.randbytes(4096)))
    spots = tuple(
        page + rng.choice((rng.randrange(64), rng.randrange(4096), 4096 - rng.randrange(9)))
        for _ in range(24)
    )
    env = aimed(rng, dataclasses.replace(env, mem=Memory(tuple(entries))), spots, 0.99)
    return Scene(env, extra, {"cpuid": {"maxphyaddr": _GUEST_MAXPHYADDR}})


def far_tables_scene(rng: Random, env: Environment) -> Scene:
    """Page tables that lead beyond the guest's MAXPHYADDR: to a device, to memory, to nothing at all.

    For the guest's processor these bits would be reserved (SDM Vol. 3A 4.4, 4.5).
    """
    frame = _far_page(rng)
    scene = physical_scene(rng, env, frames=frame, damaged=0.1, wide=True)
    extra = {**scene.extra}
    if rng.random() < 0.5:
        extra["devices"] = [device for device in extra["devices"] if device["kind"] == "pio"]
    if rng.random() < 0.5 and len(extra["devices"]) != len(scene.extra["devices"]):
        extra["phys"] = [*extra["phys"], {"addr": hex(frame), "data": rng.randbytes(4096).hex()}]
    kvm = {**scene.kvm, "cpuid": {"maxphyaddr": _GUEST_MAXPHYADDR}}
    return dataclasses.replace(scene, extra=extra, kvm=kvm)


def maxphyaddr_scene(rng: Random, env: Environment) -> Scene:
    """Beyond the guest's MAXPHYADDR: in 64-bit mode also flat memory there."""
    flat = env.mode == "prot64" and rng.random() < 0.8
    return far_scene(rng, env) if flat else far_tables_scene(rng, env)


def _far_page(rng: Random) -> int:
    return 1 << rng.randrange(_GUEST_MAXPHYADDR, 46) | rng.getrandbits(20) << 12


def eventfd_scene(rng: Random, env: Environment) -> Scene:
    """Devices, some of whose addresses are eventfds."""
    scene = device_scene(rng, env)
    addresses = rng.sample(scene.spots, min(len(scene.spots), 6))
    env = aimed(rng, scene.env, (*addresses * 4, *scene.spots[:6]), 0.97)
    fds: list[dict[str, Any]] = [{"addr": address} for address in addresses]
    for fd in fds:
        if rng.random() < 0.15:
            fd["len"] = rng.choice((1, 2, 4, 8))
            if rng.random() < 0.4:
                fd["datamatch"] = rng.choice((0, 1, 0xFF))
    return dataclasses.replace(scene, env=env, kvm={"ioeventfds": fds})


# -- finishes ------------------------------------------------------------------------------------


def forced(_: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """The prefix of forced emulation in front, so that the instruction stays where it is."""
    rip = case.rip - len(FORCED)
    return msgspec.structs.replace(case, code=FORCED + case.code, rip=rip if rip >= 0 else case.rip)


def fep_knob(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """The knob is 1, or 3: RFLAGS.RF is cleared, too."""
    if rng.random() < 0.2:
        kvm.setdefault("knobs", {})["force_emulation_prefix"] = 3
    return case


def ports(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """A port of the scene in DX, and I/O allowed, mostly."""
    gpr = list(case.gpr)
    gpr[VCPU_REGS_RDX] = gpr[VCPU_REGS_RDX] & ~0xFFFF | rng.choice(scene.ports)
    if rng.random() < 0.03:
        gpr[VCPU_REGS_RCX] = rng.choice((300, 1100, 5000))
    elif not gpr[VCPU_REGS_RCX] and rng.random() < 0.8:
        gpr[VCPU_REGS_RCX] = 2  # a repetition of nothing does not exit
    rflags = case.rflags | (X86_EFLAGS_IOPL if rng.random() < 0.97 else 0)
    port_in = rng.randbytes(rng.choice((0, 5, 40)))
    return msgspec.structs.replace(case, gpr=tuple(gpr), rflags=rflags, port_in=port_in)


def backdoor(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """VMware's ports, mostly without the permission that would spare them the #GP; pseudo counters."""
    gpr = list(case.gpr)
    if rng.random() < 0.75:
        gpr[VCPU_REGS_RDX] = gpr[VCPU_REGS_RDX] & ~0xFFFF | rng.choice((0x5658, 0x5659))
    gpr[VCPU_REGS_RCX] = rng.choice((0x10000, 0x10001, 0x10002, 0x10003, 0, 2, 7))
    rflags = case.rflags & ~X86_EFLAGS_IOPL if rng.random() < 0.9 else case.rflags
    return msgspec.structs.replace(case, gpr=tuple(gpr), rflags=rflags, port_in=rng.randbytes(8))


def other_vendor(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """An instruction that the other vendor's processors have, in a guest of one of them."""
    msrs = {0x174: rng.choice((0, 0x10, 0x18)), 0x175: 0xC800, 0x176: ARENA_BASE,
            0xC0000081: 0x10 << 32 | 0x23 << 48, 0xC0000082: ARENA_BASE, 0xC0000083: ARENA_BASE}  # fmt: skip
    system = msgspec.structs.replace(case.system, msr=tuple(sorted(msrs.items())))
    return msgspec.structs.replace(case, vendor=rng.choice(("intel", "amd")), system=system)


def umip(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """CR4.UMIP, without which nothing exits."""
    return msgspec.structs.replace(case, system=_umip_of(case))


def _umip_of(case: Case) -> Any:
    """One System per scene, as cases share theirs."""
    system = case.system
    cached = system.__dict__.get("_with_umip")
    if cached is None:
        cached = system.__dict__["_with_umip"] = msgspec.structs.replace(
            system, cr4=system.cr4 | cr.X86_CR4_UMIP
        )
    return cached


def some_msr(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """An MSR for RDMSR and WRMSR."""
    return msr_operands(rng, case, kvm)


def msr(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """RDMSR or WRMSR that userspace is asked about; it knows some of them."""
    regs = list(case.gpr)
    msr_access(rng, case, regs, kvm)
    msr_filter(rng, kvm)
    known = [index for index in kvm["knobs"]["msr_denied"].split(",") if rng.random() < 0.5]
    if rng.random() < 0.9:
        denied = kvm["knobs"]["msr_denied"].split(",")
        regs[VCPU_REGS_RCX] = int(rng.choice(known if rng.random() < 0.7 else denied), 16)
    system = case.system
    if rng.random() < 0.7:
        pairs = sorted((int(index, 16), rng.getrandbits(40)) for index in known)
        system = msgspec.structs.replace(system, msr=tuple(pairs))
    code = FORCED + rng.choice(MSR_CODES) + b"\xf4"
    return msgspec.structs.replace(case, code=code, gpr=tuple(regs), system=system)


def low_maxphyaddr(_: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    """The guest's MAXPHYADDR comes with the scene."""
    return case


def _task(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    return task_switch(rng, case, kvm)


def _event(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    return event(rng, case, kvm)


def _several(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    return several_instructions(rng, case, kvm)


def _direct(rng: Random, scene: Scene, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Finish
    return direct_exit(rng, case, kvm)


# -- the paths -----------------------------------------------------------------------------------


def _wide(env: Environment) -> bool:
    """The data segments reach 32 bits, and so do addresses."""
    return env.bits != 16 and not env.name.endswith(_NARROW)


def _long_or_flat(env: Environment) -> bool:
    """As many of 64-bit mode as of the others."""
    return env.mode == "prot64" or env.name.endswith("flat")


def _kernel(env: Environment) -> bool:
    return "cpl0" in env.name


def _port_access(env: Environment) -> bool:
    """Virtual-8086 mode always needs the bitmap in the TSS (SDM Vol. 3A 20.2.8.1)."""
    return env.mode != "vm86" or _tables_in_memory(env)


def _rmode(env: Environment) -> bool:
    """Hardware can enter it as virtual-8086 mode."""
    return not env.name.endswith("cs32")


def _tables_in_memory(env: Environment) -> bool:
    return env.name.endswith("flat")


_MIXED: Final = (plain_scene, device_scene, physical_scene)
_REAL: Final = ("real",)
#: Instructions of all kinds.
_MANY: Final = ("any",) * 10 + ("memory",) * 4 + ("port",) * 4 + ("msr",)
_NOT_REAL: Final = tuple(mode for mode in MODES if mode != "real")
_NOT_VM86: Final = tuple(mode for mode in MODES if mode != "vm86")

# fmt: off
RECIPES: Final[dict[str, Recipe]] = {
    "ud":                       Recipe(_MIXED, ("ud", "ud", "any"), (other_vendor,)),
    "fep":                      Recipe((plain_scene, *_MIXED), _MANY,
                                       (ports, fep_knob, some_msr, forced)),
    "vmware-gp":                Recipe((plain_scene, device_scene), ("backdoor",) * 5 + ("any",),
                                       (ports, backdoor)),
    "rmode-exception":          Recipe((plain_scene, device_scene), _MANY,
                                       (ports, some_msr), _REAL, _rmode),
    "shadow-pf":                Recipe((unpaged_scene, tables_scene, tables_scene, physical_slot_scene),
                                       ("memory", "memory", "write")),
    "ept-violation":            Recipe((device_scene, slot_scene, physical_scene, physical_slot_scene),
                                       ("memory", "memory", "write")),
    "ept-violation-maxphyaddr": Recipe((maxphyaddr_scene,), ("memory",), (low_maxphyaddr,),
                                       ("prot32", "compat32", "prot64"), _long_or_flat),
    "ept-misconfig":            Recipe((device_scene, device_scene, physical_scene), ("memory",)),
    "io-string":                Recipe((*(plain_scene,) * 4, device_scene, *(memory_scene,) * 2),
                                       ("port-string",), (ports,), usable=_port_access),
    "apic-access":              Recipe((apic_scene,), ("memory", "memory", "write"), usable=_wide),
    "desc":                     Recipe(_MIXED, ("tables",), (umip,), _NOT_REAL),
    "invalid-guest-state":      Recipe((invalid_scene,), _MANY, (ports, some_msr, _several),
                                       ("real", "prot16", "prot32", "vm86")),
    "task-switch":              Recipe((task_scene,), ("any",), (_task,), ("prot16", "prot32", "vm86"),
                                       _tables_in_memory),
    "rmode-inject":             Recipe((ivt_scene,), ("any",), (_event,), _REAL, _rmode, 0.1),
    "io-completion":            Recipe((device_scene,), ("memory", "memory", "port-string"), (ports,)),
    "msr-completion":           Recipe((plain_scene,), ("any",), (msr,), _NOT_VM86, _kernel),
    "skip":                     Recipe((eventfd_scene,), ("write",)),
    "exit":                     Recipe((plain_scene, plain_scene, device_scene, sound_scene), ("any",),
                                       (_direct,)),
}
# fmt: on
