"""KVM's switches as one typed value: module parameters, VM capabilities, quirks, the host.

A Case names them under `kvm.knobs`; names that are module parameters of kvm.ko and kvm-intel.ko
are spelled as there (Linux 6.12).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final

#: KVM_CAP_DISABLE_QUIRKS2: quirks by the name of their bit; all are on until disabled.
QUIRKS: Final = (
    "lint0_reenabled",
    "cd_nw_cleared",
    "lapic_mmio_hole",
    "out_7e_inc_rip",
    "misc_enable_no_mwait",
    "fix_hypercall_insn",
    "mwait_never_ud_faults",
    "slot_zap_all",
    "stuff_feature_msrs",
    "ignore_guest_pat",
)

#: force_emulation_prefix: bit 0 recognises the prefix, bit 1 also clears RFLAGS.RF.
FEP_ENABLE: Final = 1
FEP_CLEAR_RFLAGS_RF: Final = 2

#: KVM_CAP_X86_USER_SPACE_MSR: which failed MSR accesses go to userspace.
KVM_MSR_EXIT_REASON_INVAL: Final = 1
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 2
KVM_MSR_EXIT_REASON_FILTER: Final = 4

_LIMITS: Final = {
    "force_emulation_prefix": 3,
    "user_space_msr_mask": 7,
    "vpid": 0xFFFF,
    "host_maxphyaddr": 52,
    "tss_addr": 0xFFFFFFFF,
    "ept_identity_map_addr": (1 << 52) - 1,
}
_LEAST: Final = {"host_maxphyaddr": 36}


class OptionsError(ValueError):
    """A knob is unknown, has the wrong type, or contradicts another."""


@dataclass(frozen=True, slots=True)
class KvmOptions:
    """All switches, with KVM's defaults on a current Intel host.

    `vpid` is the tag of this vCPU's translations (0: VPID off). `msr_denied` lists MSRs that the
    userspace filter refuses; `user_space_msr_mask` is KVM_MSR_EXIT_REASON_*. `host_*` describe the
    processor that KVM runs on.
    """

    # kvm-intel.ko
    ept: bool = True
    unrestricted_guest: bool = True
    emulate_invalid_guest_state: bool = True
    fasteoi: bool = True
    flexpriority: bool = True
    enable_apicv: bool = False
    allow_smaller_maxphyaddr: bool = False
    vnmi: bool = True
    vpid: int = 1
    nested: bool = True
    # kvm.ko
    force_emulation_prefix: int = 0
    enable_vmware_backdoor: bool = False
    mmio_caching: bool = True
    ignore_msrs: bool = False
    enable_pmu: bool = False
    # capabilities of the VM
    exit_on_emulation_error: bool = False
    exception_payload_enabled: bool = False
    user_space_msr_mask: int = 0
    msr_denied: frozenset[int] = frozenset()
    irqchip: bool = False
    hlt_in_guest: bool = False
    mwait_in_guest: bool = False
    platform_info_readable: bool = True
    disabled_quirks: frozenset[str] = frozenset()
    hypercall_exits: bool = False
    hyperv: bool = False
    hyperv_synic: bool = False
    enforce_pv_features: bool = False
    tss_addr: int = 0xFEFFD000
    ept_identity_map_addr: int = 0xFEFFC000
    # the host
    host_la57: bool = False
    host_maxphyaddr: int = 52
    host_umip: bool = True
    host_hypervisor: bool = False
    host_split_lock_detect: bool = False

    def has_quirk(self, name: str) -> bool:
        """KVM: kvm_check_has_quirk; KeyError for a name that is not in QUIRKS."""
        if name not in QUIRKS:
            raise KeyError(name)
        return name not in self.disabled_quirks

    @property
    def umip_emulated(self) -> bool:
        """KVM: vmx_umip_emulated, descriptor-table exits stand in for a processor without UMIP."""
        return not self.host_umip


_TYPES: Final = {field.name: field.type for field in fields(KvmOptions)}
_DEFAULT: Final = KvmOptions()


def options_from_knobs(knobs: Mapping[str, Any] | None) -> KvmOptions:
    """The options of a Case's `kvm.knobs`: name -> bool, int or, for sets, comma-separated text.

    As in kvm-intel.ko, `unrestricted_guest` needs `ept`: it is off by default without EPT, and
    asking for both is an error. OptionsError names the knob that is refused.
    """
    if not knobs:
        return _DEFAULT
    key = tuple((name, type(value), value) for name, value in knobs.items())
    hashable = all(isinstance(value, int | str) for value in knobs.values())
    return _options(key) if hashable else _options.__wrapped__(key)


@lru_cache(maxsize=256)
def _options(knobs: tuple[tuple[str, type, Any], ...]) -> KvmOptions:
    """As `options_from_knobs`; the types keep 1 and true apart."""
    values = {name: _value(name, value) for name, _, value in knobs}
    if not values.get("ept", True):
        if values.setdefault("unrestricted_guest", False):
            raise OptionsError("knob unrestricted_guest needs ept")
    return replace(_DEFAULT, **values)


def _value(name: str, value: Any) -> Any:
    kind = _TYPES.get(name)
    if kind is None:
        raise OptionsError(f"unknown knob {name!r}")
    if kind == "bool":
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise OptionsError(f"knob {name}: {value!r} is not a bool")
    if kind == "int":
        return _number(name, value)
    if not isinstance(value, str):
        raise OptionsError(f"knob {name}: {value!r} is not a comma-separated list")
    items = frozenset(item for item in value.replace(" ", "").split(",") if item)
    return _msrs(name, items) if name == "msr_denied" else _quirks(name, items)


def _number(name: str, value: Any) -> int:
    low, high = _LEAST.get(name, 0), _LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionsError(f"knob {name}: {value!r} is not a number from {low} to {high}")
    return value


def _msrs(name: str, items: frozenset[str]) -> frozenset[int]:
    return frozenset(_msr(name, item) for item in items)


def _msr(name: str, item: str) -> int:
    """An index, decimal or hexadecimal with 0x."""
    try:
        number = int(item, 0)
    except ValueError as error:
        raise OptionsError(f"knob {name}: {item!r} is not the index of an MSR") from error
    if not 0 <= number <= 0xFFFFFFFF:
        raise OptionsError(f"knob {name}: an MSR index has 32 bits")
    return number


def _quirks(name: str, items: frozenset[str]) -> frozenset[str]:
    unknown = items - set(QUIRKS)
    if unknown:
        raise OptionsError(f"knob {name}: unknown quirk {min(unknown)!r}")
    return items
