"""What processor and kernel this is, and whether they have what the oracle needs."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from emufuzz.case.model import PAGE_SHIFT
from emufuzz.oracle.base import OracleUnavailableError

_VENDORS: Final = {"AuthenticAMD": "amd", "HygonGenuine": "amd", "GenuineIntel": "intel"}
_CPUINFO: Final = Path("/proc/cpuinfo")
_STATUS: Final = Path("/proc/self/status")
_LOWEST_ADDRESS: Final = Path("/proc/sys/vm/mmap_min_addr")
_CAP_SYS_RAWIO: Final = 17
#: Features that the runner uses: FS and GS bases of its choice, and the layout of its signal frame.
_NEEDED: Final = ("fsgsbase", "xsave", "fxsr")


@dataclass(frozen=True, slots=True)
class Host:
    """The processor.

    Attributes:
        vendor: `intel`, `amd`, or the CPUID string of another vendor.
        family: CPU family.
        model: CPU model.
        stepping: CPU stepping.
        name: Brand string.
        features: Feature flags as the kernel names them.
    """

    vendor: str
    family: int
    model: int
    stepping: int
    name: str
    features: frozenset[str]


@lru_cache(maxsize=1)
def host() -> Host:
    """The processor that this process runs on.

    Raises:
        OracleUnavailableError: it is not an x86-64 Linux with what the oracle needs.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OracleUnavailableError("native: needs Linux on x86-64")
    found = parse_cpuinfo(_CPUINFO.read_text(encoding="ascii", errors="replace"))
    missing = [name for name in _NEEDED if name not in found.features]
    if missing:
        raise OracleUnavailableError(f"native: the processor or kernel lacks {', '.join(missing)}")
    return found


def parse_cpuinfo(text: str) -> Host:
    """The first processor of a /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    vendor = fields.get("vendor_id", "unknown")
    return Host(
        vendor=_VENDORS.get(vendor, vendor),
        family=int(fields.get("cpu family", "0")),
        model=int(fields.get("model", "0")),
        stepping=int(fields.get("stepping", "0")) if fields.get("stepping", "").isdigit() else 0,
        name=fields.get("model name", ""),
        features=frozenset(fields.get("flags", "").split()),
    )


@lru_cache(maxsize=1)
def lowest_page() -> int:
    """Number of the lowest page that this process may map (vm.mmap_min_addr)."""
    status = _STATUS.read_text(encoding="ascii", errors="replace")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    if int(effective, 16) >> _CAP_SYS_RAWIO & 1:
        return 0
    return int(_LOWEST_ADDRESS.read_text(encoding="ascii")) + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT
