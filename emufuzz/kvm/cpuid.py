"""The guest's CPUID: leaves, feature tests and what KVM derives from them.

KVM: cpuid.c (kvm_cpuid, get_out_of_range_cpuid_entry, kvm_update_cpuid_runtime), the
__cr4_reserved_bits of x86.h, the reserved bits of a guest-physical address.
SDM Vol. 2A CPUID; APM Vol. 3 Appendix E.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from emufuzz.arch import cr as crs

X86_CR4_VMXE: Final = 1 << 13
X86_CR4_PKE: Final = 1 << 22
X86_CR4_LAM_SUP: Final = 1 << 28

EAX, EBX, ECX, EDX = range(4)
_REGISTERS: Final = {"eax": EAX, "ebx": EBX, "ecx": ECX, "edx": EDX}
_MASK32: Final = 0xFFFFFFFF
_KVM_SIGNATURE: Final = (0x4B4D564B, 0x564B4D56, 0x4D)  # "KVMKVMKVM"
_HYPERVISOR_BASE: Final = 0x40000000


class Feature(NamedTuple):
    """Where a feature bit lives: leaf, subleaf, register (EAX..EDX), bit number."""

    function: int
    subleaf: int
    register: int
    bit: int


# fmt: off
#: Feature name -> its bit. Only features that the model tests.
FEATURES: Final = {
    "mwait":           Feature(1, 0, ECX, 3),
    "vmx":             Feature(1, 0, ECX, 5),
    "pcid":            Feature(1, 0, ECX, 17),
    "x2apic":          Feature(1, 0, ECX, 21),
    "movbe":           Feature(1, 0, ECX, 22),
    "tsc_deadline":    Feature(1, 0, ECX, 24),
    "xsave":           Feature(1, 0, ECX, 26),
    "rdrand":          Feature(1, 0, ECX, 30),
    "osxsave":         Feature(1, 0, ECX, 27),
    "xmm3":            Feature(1, 0, ECX, 0),
    "apic":            Feature(1, 0, EDX, 9),
    "fxsr":            Feature(1, 0, EDX, 24),
    "fsgsbase":        Feature(7, 0, EBX, 0),
    "tsc_adjust":      Feature(7, 0, EBX, 1),
    "smep":            Feature(7, 0, EBX, 7),
    "invpcid":         Feature(7, 0, EBX, 10),
    "rtm":             Feature(7, 0, EBX, 11),
    "rdseed":          Feature(7, 0, EBX, 18),
    "smap":            Feature(7, 0, EBX, 20),
    "umip":            Feature(7, 0, ECX, 2),
    "pku":             Feature(7, 0, ECX, 3),
    "ospke":           Feature(7, 0, ECX, 4),
    "waitpkg":         Feature(7, 0, ECX, 5),
    "la57":            Feature(7, 0, ECX, 16),
    "rdpid":           Feature(7, 0, ECX, 22),
    "bus_lock_detect": Feature(7, 0, ECX, 24),
    "arch_capabilities": Feature(7, 0, EDX, 29),
    "lam":             Feature(7, 1, EAX, 26),
    "xsaves":          Feature(13, 1, EAX, 3),
    "nx":              Feature(0x80000001, 0, EDX, 20),
    "gbpages":         Feature(0x80000001, 0, EDX, 26),
    "rdtscp":          Feature(0x80000001, 0, EDX, 27),
    "lm":              Feature(0x80000001, 0, EDX, 29),
}
#: Feature -> the CR4 bits that are reserved without it.
CR4_FEATURES: Final = {
    "xsave":    crs.X86_CR4_OSXSAVE,
    "smep":     crs.X86_CR4_SMEP,
    "smap":     crs.X86_CR4_SMAP,
    "fsgsbase": crs.X86_CR4_FSGSBASE,
    "pku":      X86_CR4_PKE,
    "la57":     crs.X86_CR4_LA57,
    "umip":     crs.X86_CR4_UMIP,
    "vmx":      X86_CR4_VMXE,
    "pcid":     crs.X86_CR4_PCIDE,
    "lam":      X86_CR4_LAM_SUP,
}
# fmt: on

#: CR4 bits that KVM knows at all (CR4_RESERVED_BITS is the complement).
CR4_KNOWN: Final = (
    crs.X86_CR4_VME | crs.X86_CR4_PVI | crs.X86_CR4_TSD | crs.X86_CR4_DE | crs.X86_CR4_PSE
    | crs.X86_CR4_PAE | crs.X86_CR4_MCE | crs.X86_CR4_PGE | crs.X86_CR4_PCE | crs.X86_CR4_OSFXSR
    | crs.X86_CR4_OSXMMEXCPT | sum(CR4_FEATURES.values())
)  # fmt: skip

_INTEL: Final = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX: "GenuineIntel"
_AMD: Final = (0x68747541, 0x444D4163, 0x69746E65)  # "AuthenticAMD"
_HYGON: Final = (0x6F677948, 0x656E6975, 0x6E65476E)  # "HygonGenuine"
_SIGNATURE: Final = {"intel": 0x306C3, "amd": 0xA20F10}

Leaf = list[int]


class CpuidError(ValueError):
    """A CPUID override is malformed."""


def default_leaves(vendor: str) -> dict[tuple[int, int], Leaf]:
    """(function, index) -> EAX..EDX of the guest of docs/case-format.md."""
    ebx, ecx, edx = _INTEL if vendor == "intel" else _AMD
    return {
        (0, 0): [0xD, ebx, ecx, edx],
        (1, 0): [_SIGNATURE[vendor], 0x10800, 0xC82201, 0x78BFBFF],
        (7, 0): [0, 8, 0x400000, 0],
        (0x80000000, 0): [0x80000008, 0, 0, 0],
        (0x80000001, 0): [0, 0, 0x21, 0x2FD3FBFF],
        (0x80000008, 0): [0x3034, 0, 0, 0],
    }


class GuestCpuid:
    """The CPUID that the guest sees; what is derived from it is computed once.

    `indexed` holds the functions whose subleaf (ECX) matters; the others ignore ECX.
    """

    __slots__ = (
        "amd_compatible",
        "cr4_guest_rsvd_bits",
        "features",
        "indexed",
        "leaves",
        "maxphyaddr",
        "reserved_gpa_bits",
    )

    def __init__(self, leaves: dict[tuple[int, int], Leaf]) -> None:
        self.leaves = leaves
        self.indexed = {4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x1F} | {f for f, index in leaves if index}
        self.features = frozenset(name for name in FEATURES if self._bit(FEATURES[name]))
        self.maxphyaddr = self._query_maxphyaddr()
        self.reserved_gpa_bits = (1 << 64) - (1 << self.maxphyaddr)
        self.amd_compatible = tuple(leaves.get((0, 0), [0] * 4)[1:]) in (_AMD, _HYGON)
        self.cr4_guest_rsvd_bits = cr4_reserved_bits(self.features)

    def _bit(self, feature: Feature) -> bool:
        leaf = self.leaves.get((feature.function, feature.subleaf))
        return leaf is not None and bool(leaf[feature.register] >> feature.bit & 1)

    def _query_maxphyaddr(self) -> int:
        """KVM: cpuid_query_maxphyaddr, 36 bits where the guest is not told."""
        top, leaf = self.leaves.get((0x80000000, 0)), self.leaves.get((0x80000008, 0))
        if top is None or top[EAX] < 0x80000008 or leaf is None:
            return 36
        return leaf[EAX] & 0xFF

    def has(self, name: str) -> bool:
        """KVM: guest_cpuid_has; KeyError for a name that is not in FEATURES."""
        if name in self.features:
            return True
        if name not in FEATURES:
            raise KeyError(name)
        return False

    @property
    def intel_compatible(self) -> bool:
        """KVM: guest_cpuid_is_intel_compatible, everything but AMD and Hygon."""
        return not self.amd_compatible

    def find(self, function: int, index: int) -> Leaf | None:
        """KVM: kvm_find_cpuid_entry_index; ECX counts only for functions with subleaves."""
        return self.leaves.get((function, index if function in self.indexed else 0))

    def cpuid(self, eax: int, ecx: int, *, exact_only: bool = False) -> tuple[bool, int, int, int, int]:
        """(leaf exists, EAX, EBX, ECX, EDX) (KVM: kvm_cpuid).

        Without `exact_only` an Intel guest gets the highest basic leaf where its own is out of
        range (SDM Vol. 2A CPUID, "INPUT EAX").
        """
        function, index = eax & _MASK32, ecx & _MASK32
        entry = self.find(function, index)
        exact = entry is not None
        if entry is None and not exact_only:
            function, entry = self._out_of_range(function, index)
        if entry is not None:
            return exact, entry[0], entry[1], entry[2], entry[3]
        if function in (0xB, 0x1F):
            topology = self.find(function, 1)
            if topology is not None:
                return exact, 0, 0, index & 0xFF, topology[EDX]
        return exact, 0, 0, 0, 0

    def _out_of_range(self, function: int, index: int) -> tuple[int, Leaf | None]:
        """KVM: get_out_of_range_cpuid_entry; the function stays as it is without a redirection."""
        basic = self.leaves.get((0, 0))
        if basic is None or self.amd_compatible:
            return function, None
        if 0x40000000 <= function <= 0x4FFFFFFF:
            of_class = self.find(function & 0xFFFFFF00, 0)
        elif function >= 0xC0000000:
            of_class = self.find(0xC0000000, 0)
        else:
            of_class = self.find(function & 0x80000000, 0)
        if of_class is not None and function <= of_class[EAX]:
            return function, None
        return basic[EAX], self.find(basic[EAX], index)

    def pv_features(self) -> int:
        """EAX of KVM's own leaf 40000001h, 0 for a guest that is not told (KVM: guest_pv_has)."""
        signature = self.leaves.get((_HYPERVISOR_BASE, 0))
        if signature is None or tuple(signature[1:]) != _KVM_SIGNATURE:
            return 0
        leaf = self.leaves.get((_HYPERVISOR_BASE + 1, 0))
        return leaf[EAX] if leaf is not None else 0

    def set_runtime(self, name: str, *, on: bool) -> None:
        """Let a bit follow the machine's state (KVM: kvm_update_cpuid_runtime, OSXSAVE OSPKE APIC MWAIT)."""
        feature = FEATURES[name]
        key = feature.function, feature.subleaf
        leaf = self.leaves.get(key)
        if leaf is None or on == bool(leaf[feature.register] >> feature.bit & 1):
            return
        leaf = leaf.copy()
        leaf[feature.register] ^= 1 << feature.bit
        self.leaves = {**self.leaves, key: leaf}
        self.features = self.features | {name} if on else self.features - {name}

    def copy(self) -> GuestCpuid:
        """A CPUID that `set_runtime` can change without changing this one."""
        twin = GuestCpuid.__new__(GuestCpuid)
        for name in GuestCpuid.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    @property
    def supported_xcr0(self) -> int:
        """XCR0 bits that leaf 0Dh offers (KVM: vcpu_get_supported_xcr0)."""
        leaf = self.leaves.get((0xD, 0))
        return leaf[EAX] | leaf[EDX] << 32 if leaf is not None else 0


def cr4_reserved_bits(features: frozenset[str]) -> int:
    """The CR4 bits that a CPU with these features refuses (KVM: __cr4_reserved_bits)."""
    reserved = ~CR4_KNOWN & (1 << 64) - 1
    for name, bit in CR4_FEATURES.items():
        if name not in features:
            reserved |= bit
    return reserved


def guest_cpuid(vendor: str, overrides: Any = None, implied: frozenset[str] = frozenset()) -> GuestCpuid:
    """The CPUID of a case.

    Args:
        vendor: `intel` or `amd`.
        overrides: the case's `kvm.cpuid`: {"leaves": [{"function", "index", "eax" .. "edx"}],
            "features": {name: bool}, "maxphyaddr": bits}; CpuidError if it is malformed.
        implied: features that the initial state makes evident; overrides rank above them.
    """
    if overrides is None:
        return _plain_cpuid(vendor, implied).copy()
    leaves = _leaves_with(vendor, implied)
    _override(leaves, overrides)
    return GuestCpuid(leaves)


@cache
def _plain_cpuid(vendor: str, implied: frozenset[str]) -> GuestCpuid:
    return GuestCpuid(_leaves_with(vendor, implied))


def _leaves_with(vendor: str, features: frozenset[str]) -> dict[tuple[int, int], Leaf]:
    leaves = default_leaves(vendor)
    for name in features:
        _set_feature(leaves, name, on=True)
    return leaves


def _override(leaves: dict[tuple[int, int], Leaf], overrides: Any) -> None:
    if not isinstance(overrides, Mapping) or overrides.keys() - {"leaves", "features", "maxphyaddr"}:
        raise CpuidError("kvm.cpuid: expecting an object with leaves, features, maxphyaddr")
    for leaf in overrides.get("leaves", ()):
        _override_leaf(leaves, leaf)
    for name, on in overrides.get("features", {}).items():
        if name not in FEATURES or not isinstance(on, (bool, int)):
            raise CpuidError(f"kvm.cpuid.features: unknown feature or no bool: {name!r}: {on!r}")
        _set_feature(leaves, name, on=bool(on))
    if "maxphyaddr" in overrides:
        bits = _number(overrides["maxphyaddr"], "maxphyaddr")
        if not 32 <= bits <= 52:
            raise CpuidError(f"kvm.cpuid.maxphyaddr: {bits} is not from 32 to 52")
        widths = leaves.setdefault((0x80000008, 0), [0x3034, 0, 0, 0])
        widths[EAX] = widths[EAX] & ~0xFF | bits


def _override_leaf(leaves: dict[tuple[int, int], Leaf], leaf: Any) -> None:
    if not isinstance(leaf, Mapping) or "function" not in leaf:
        raise CpuidError("kvm.cpuid.leaves: expecting objects with function, index, eax, ebx, ecx, edx")
    unknown = leaf.keys() - _REGISTERS.keys() - {"function", "index"}
    if unknown:
        raise CpuidError(f"kvm.cpuid.leaves: unknown field {min(unknown)!r}")
    key = _number(leaf["function"], "function"), _number(leaf.get("index", 0), "index")
    values = leaves.setdefault(key, [0, 0, 0, 0])
    for name, register in _REGISTERS.items():
        if name in leaf:
            values[register] = _number(leaf[name], name)


def _number(value: Any, name: str) -> int:
    """An int, or text such as 0x7, of 32 bits."""
    try:
        number = int(value, 0) if isinstance(value, str) else int(value)
    except (TypeError, ValueError) as error:
        raise CpuidError(f"kvm.cpuid: {name}: {value!r} is not a number") from error
    if not 0 <= number <= _MASK32:
        raise CpuidError(f"kvm.cpuid: {name}: {value!r} has more than 32 bits")
    return number


def _set_feature(leaves: dict[tuple[int, int], Leaf], name: str, *, on: bool) -> None:
    feature = FEATURES[name]
    leaf = leaves.setdefault((feature.function, feature.subleaf), [0, 0, 0, 0])
    leaf[feature.register] = leaf[feature.register] & ~(1 << feature.bit) | on << feature.bit
    if feature.function == 7 and feature.subleaf > leaves[7, 0][EAX]:
        leaves[7, 0][EAX] = feature.subleaf
    if name == "xsave" and on:
        leaves.setdefault((0xD, 0), [7, 0x240, 0x340, 0])


@cache
def implied_features(cr4: int) -> frozenset[str]:
    """Features that a machine must have whose CR4 holds this value."""
    return frozenset(name for name, bit in CR4_FEATURES.items() if cr4 & bit)
