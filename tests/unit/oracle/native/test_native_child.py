"""The child has what it needs and nothing else; where it cannot be had, the oracle says why."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.native import NativeOracle, child, host, image, selftest
from emufuzz.oracle.native.child import Child
from emufuzz.oracle.native.image import Layout, program
from emufuzz.oracle.native.layout import CODE_SIZE, IN_SIZE, MAX_PAGES, OUT_SIZE, RECORDS, Arena

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: 6
model\t\t: 106
model name\t: A processor
stepping\t: 6
flags\t\t: fpu fxsr xsave {flags}

processor\t: 1
vendor_id\t: Other
"""


@pytest.fixture
def started(native):  # where there is no native oracle, there are no children either
    opened = Child((0x108, 0x140, 0x141), ())
    yield opened
    opened.close()


def descriptors() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def status(pid: int, field: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith(field + ":"))


def test_it_is_confined(started):
    assert status(started.pid, "Seccomp") == "1"
    assert status(started.pid, "Threads") == "1"


def test_it_has_two_pipes_and_no_file(started):
    links = {link.name: str(link.readlink()) for link in Path(f"/proc/{started.pid}/fd").iterdir()}
    assert links.keys() == {"0", "1"}
    assert all(link.startswith("pipe:") for link in links.values())


def test_its_memory_is_the_runner_and_the_pages(started):
    lines = Path(f"/proc/{started.pid}/maps").read_text(encoding="ascii").splitlines()
    ranges = {line.split()[0]: line.split()[1] for line in lines if "[vsyscall]" not in line}
    base, end = started.layout.base, started.layout.base + started.arena.runtime_size
    outside = {
        name: rights for name, rights in ranges.items() if not base <= int(name.split("-")[0], 16) < end
    }
    assert outside == {"00108000-00109000": "rwxs", "00140000-00142000": "rwxs"}
    assert not [name for name, rights in ranges.items() if name not in outside and "wx" in rights]


def test_every_child_lies_elsewhere(native):
    children = [Child((0x108,), ()) for _ in range(4)]
    try:
        assert len({one.layout.base for one in children}) == 4
    finally:
        for one in children:
            one.close()


def test_closing_twice_is_no_error(started):
    pid = started.pid
    started.close()
    started.close()
    assert not Path(f"/proc/{pid}").exists()


def test_parts_of_the_arena_do_not_overlap():
    for pages in (1, 17, MAX_PAGES):
        arena = Arena(pages)
        places = [arena.control, arena.common, arena.records_in, arena.records_out, arena.pristine]
        places += [arena.pool, arena.live, arena.size]
        assert places == sorted(places)
        assert all(place % 4096 == 0 for place in places)
        assert arena.records_out - arena.records_in == RECORDS * IN_SIZE
        assert arena.pristine - arena.records_out == RECORDS * OUT_SIZE


def test_the_largest_program_fits():
    pages = tuple(range(0x100, 0x100 + 2 * MAX_PAGES, 2))  # no two of them neighbours
    data, calls = program(Layout(1 << 40, pages, ()))
    assert len(data) == CODE_SIZE
    assert data[:4] == b"\x7fELF"
    assert calls[-1].what == "seccomp"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("_SYS_MODIFY_LDT", "modify_ldt"),
        ("_SYS_SIGALTSTACK", "sigaltstack"),
        ("_SYS_RT_SIGACTION", "sigaction"),
        ("_SYS_MMAP", "mmap"),
        ("_SYS_MUNMAP", "munmap"),
        ("_SYS_CLOSE_RANGE", "close_range"),
        ("_SYS_PRCTL", "prctl(PR_SET_PDEATHSIG)"),
    ],
)
def test_a_refused_system_call_is_named(monkeypatch, native, name, call):
    monkeypatch.setattr(image, name, 9999)  # no such system call
    with pytest.raises(OracleUnavailableError) as unavailable:
        NativeOracle()
    assert str(unavailable.value) == f"native: {call}: ENOSYS"


def test_seccomp_that_is_refused_is_named(monkeypatch, native):
    monkeypatch.setattr(image, "_SECCOMP_MODE_STRICT", 77)
    with pytest.raises(OracleUnavailableError, match=r"^native: seccomp: EINVAL$"):
        NativeOracle()


def test_a_memfd_that_is_refused_is_named(monkeypatch, native):
    def refuse(_name: str) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(child.os, "memfd_create", refuse)
    with pytest.raises(OracleUnavailableError, match=r"^native: memfd_create: Operation not permitted$"):
        NativeOracle()


def test_memory_that_is_refused_is_named(monkeypatch, native):
    def refuse(_descriptor: int, _size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    before = descriptors()
    monkeypatch.setattr(child.os, "ftruncate", refuse)
    with pytest.raises(OracleUnavailableError, match=r"^native: [\d,]+ bytes of memory: File too large$"):
        NativeOracle()
    assert descriptors() == before


def test_a_process_that_cannot_be_started_is_named(monkeypatch, native):
    def refuse(*_arguments: object, **_options: object) -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = descriptors()
    monkeypatch.setattr(child.os, "posix_spawn", refuse)
    with pytest.raises(OracleUnavailableError, match=r"^native: starting its process: Resource temporarily"):
        NativeOracle()
    assert descriptors() == before


def test_a_child_that_dies_at_once_is_named(monkeypatch, native):
    monkeypatch.setattr(image, "start_code", lambda *_: b"\x0f\x0b")
    with pytest.raises(OracleUnavailableError, match=r"^native: the process ends before its first case: "):
        NativeOracle()


@pytest.mark.parametrize("test", ["arithmetic", "memory", "exceptions", "segments"])
def test_a_self_test_that_fails_is_named(monkeypatch, native, test):
    monkeypatch.setattr(selftest, test, named(test))
    with pytest.raises(OracleUnavailableError, match=f"^native fails its self-test: {test}$"):
        NativeOracle()


def named(name: str):
    def failing(_runner: object) -> bool:
        return False

    failing.__name__ = name
    return failing


def test_a_child_without_seccomp_is_noticed(monkeypatch, native):
    monkeypatch.setattr(selftest, "confined", lambda _child: False)
    with pytest.raises(OracleUnavailableError, match="seccomp's strict mode is not in force"):
        NativeOracle()


def test_processor_is_read_from_cpuinfo():
    found = host.parse_cpuinfo(CPUINFO.format(vendor="GenuineIntel", flags="fsgsbase"))
    assert (found.vendor, found.family, found.model, found.stepping) == ("intel", 6, 106, 6)
    assert found.name == "A processor"
    assert "fsgsbase" in found.features


@pytest.mark.parametrize(("vendor", "name"), [("AuthenticAMD", "amd"), ("CentaurHauls", "CentaurHauls")])
def test_other_vendors(vendor, name):
    assert host.parse_cpuinfo(CPUINFO.format(vendor=vendor, flags="")).vendor == name


def test_a_processor_without_what_is_needed(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(vendor="GenuineIntel", flags=""), encoding="ascii")
    monkeypatch.setattr(host, "_CPUINFO", cpuinfo)
    host.host.cache_clear()
    try:
        with pytest.raises(OracleUnavailableError, match=r"^native: the processor or kernel lacks fsgsbase$"):
            NativeOracle()
    finally:
        host.host.cache_clear()


def test_another_machine(monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    host.host.cache_clear()
    try:
        with pytest.raises(OracleUnavailableError, match=r"^native: needs Linux on x86-64$"):
            NativeOracle()
    finally:
        host.host.cache_clear()


def test_pages_below_the_lowest_address_need_a_capability(monkeypatch, tmp_path):
    status_file, lowest = tmp_path / "status", tmp_path / "mmap_min_addr"
    lowest.write_text("65536\n", encoding="ascii")
    monkeypatch.setattr(host, "_STATUS", status_file)
    monkeypatch.setattr(host, "_LOWEST_ADDRESS", lowest)
    for effective, page in (("0000000000000000", 16), ("0000000000020000", 0)):
        status_file.write_text(f"Name:\tx\nCapEff:\t{effective}\n", encoding="ascii")
        host.lowest_page.cache_clear()
        assert host.lowest_page() == page
    host.lowest_page.cache_clear()
