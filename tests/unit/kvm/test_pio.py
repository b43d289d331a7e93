"""Port I/O: IN and OUT by their own exit, INS and OUTS through the emulator, the in-kernel bus."""

from __future__ import annotations

import pytest
from support.machines import DB, PathVm, accesses, enter, exits, mem, path_case, reg, run_path

TF, DF = 1 << 8, 1 << 10
PORT_BYTES = bytes(range(1, 65))


def io(vm: PathVm) -> tuple[str, int, int, int]:
    """Direction, port, size and count of KVM_EXIT_IO."""
    assert vm.exit.exit_reason == "IO"
    data = vm.exit.data
    return data["direction"], data["port"], data["size"], data["count"]


# -- IN and OUT without the emulator -------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [
        ("e460", 1, 0x1122334455667701),
        ("66e560", 2, 0x1122334455660201),
        ("e560", 4, 0x04030201),  # zero-extended
        ("48ed", 4, 0x04030201),
    ],
)
def test_fast_in(code, size, rax):
    vm = enter("exit", code=code, rax=0x1122334455667788, rdx=0x60, port_in=PORT_BYTES)
    assert io(vm) == ("in", 0x60, size, 1)
    assert vm.machine.emulations == 0
    outcome = vm.finish()
    assert (reg(outcome, "rax"), outcome.rip) == (rax, 0x6000 + len(code) // 2)


def test_fast_out():
    vm = enter("exit", code="66ef", rax=0x11223344, rdx=0x3F8)
    assert (io(vm), vm.exit.data["data"]) == (("out", 0x3F8, 2, 1), b"\x44\x33")
    assert vm.rip == 0x6000
    assert (vm.run().rip, vm.machine.pio.count) == (0x6002, 0)


@pytest.mark.parametrize("code", ["e460", "e660"])
def test_userspace_that_moves_rip_skips_by_itself(code):
    """As VMware's and QEMU's resets do: the completion finds another RIP and changes nothing."""
    vm = enter("exit", code=code, rax=0x55)
    vm.set_regs(rip=0x7000)
    vm.run(pio=b"\x99")
    assert (vm.rip, vm.reg("rax")) == (0x7000, 0x55)
    assert vm.machine.pio.count == 0


def test_port_7e_is_skipped_before_userspace_sees_it():
    vm = enter("exit", code="e67e")
    assert (io(vm), vm.rip) == (("out", 0x7E, 1, 1), 0x6002)
    assert vm.run().rip == 0x6002


def test_without_the_quirk_port_7e_is_like_others():
    vm = enter("exit", code="e67e", knobs={"disabled_quirks": "out_7e_inc_rip"})
    assert (vm.rip, vm.run().rip) == (0x6000, 0x6002)


@pytest.mark.parametrize("code", ["e460", "e660"])
def test_a_fast_port_access_is_single_stepped_when_it_ends(code):
    vm = enter("exit", code=code, flags=TF)
    assert vm.pending is None
    assert vm.run().pending == (DB, None, None)


@pytest.mark.parametrize(
    ("fd", "left"),
    [
        ({"addr": 0x60, "port": True}, False),
        ({"addr": 0x60, "port": True, "len": 1, "datamatch": 5}, False),
        ({"addr": 0x60, "port": True, "len": 1, "datamatch": 6}, True),
        ({"addr": 0x61, "port": True}, True),
    ],
)
@pytest.mark.parametrize("path", ["exit", "fep"])
def test_an_ioeventfd_takes_an_out(path, fd, left):
    vm = enter(path, code="e660", rax=5, kvm={"ioeventfds": [fd]})
    assert vm.left is left
    assert left or vm.rip == 0x6002 + 5 * (path == "fep")


# -- INS and OUTS --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rcx", "count", "size"),
    [
        ("6c", 9, 1, 1),
        ("f36c", 5, 5, 1),
        ("66f36d", 5, 5, 2),
        ("f36d", 5, 5, 4),
        ("f36c", 0x1000, 0x400, 1),  # 1024 bytes of buffer
        ("f36d", 0x1000, 0x100, 4),
    ],
)
def test_ins_asks_for_as_much_as_it_can(code, rcx, count, size):
    vm = enter("io-string", code=code, rcx=rcx, rdx=0x60, rdi=0x8000)
    assert io(vm) == ("in", 0x60, size, count)


@pytest.mark.parametrize(
    ("rdi", "flags", "count"),
    [(0x8FF0, 0, 16), (0x8FFF, 0, 1), (0x9000, 0, 0x40), (0x8005, DF, 5), (0x8000, DF, 1)],
)
def test_ins_stays_within_the_page(rdi, flags, count):
    vm = enter("io-string", code="f36c", rcx=0x40, rdx=0x60, rdi=rdi, flags=flags)
    assert io(vm) == ("in", 0x60, 1, count)


def test_rep_ins_ends_after_as_many_exits_as_it_takes():
    case = path_case("io-string", code="f36c", rcx=20, rdx=0x60, rdi=0x8FF8, port_in=PORT_BYTES)
    vm = PathVm(case).enter()
    outcome = vm.finish()
    assert exits(outcome) == ["IO"]
    assert (outcome.rip, reg(outcome, "rcx"), reg(outcome, "rdi")) == (0x6000, 12, 0x9000)
    assert mem(case, outcome, 0x8FF8, 8) == PORT_BYTES[:8]


def test_rep_ins_backwards():
    outcome = run_path("io-string", code="f36c", rcx=3, rdx=0x60, rdi=0x8004, flags=DF, port_in=PORT_BYTES)
    assert outcome.pages[8][:5] == b"\0\0\x03\x02\x01"
    assert (reg(outcome, "rcx"), reg(outcome, "rdi")) == (0, 0x8001)
    assert outcome.restarts == 2


def test_outs_leaves_for_each_element():
    data = {0x8000: b"abc"}
    outcome = run_path("io-string", code="f36e", rcx=3, rdx=0x60, rsi=0x8000, data=data)
    assert accesses(outcome) == [("write", 0x60, "61")]
    assert (outcome.rip, reg(outcome, "rcx"), reg(outcome, "rsi")) == (0x6000, 2, 0x8001)


def test_outs_to_an_ioeventfd_goes_on():
    fds = [{"addr": 0x60, "port": True}]
    outcome = run_path("io-string", code="f36e", rcx=3, rdx=0x60, rsi=0x8000, kvm={"ioeventfds": fds})
    assert (exits(outcome), reg(outcome, "rcx"), outcome.restarts) == ([], 0, 2)


# -- userspace in between ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rcx", "stored", "left"),
    [
        (1, b"\x11\0\0\0\0", 0),
        (2, b"\x11\x22\0\0\0", 0),
        (4, b"\x11\x22\x33\x99\0", 0),
        (0x2000, b"\x11\x22\x33\x99\x99", 0x1C00),
    ],
)
def test_userspace_changes_rcx_of_rep_ins(rcx, stored, left):
    """KVM's userspace_io test: the answer is taken whatever RCX says, as many bytes as RCX says.

    Beyond the answer there is what an earlier one has left in the buffer.
    """
    vm = enter("io-string", code="f36c", rcx=3, rdx=0x60, rdi=0x8000)
    vm.machine.pio.read_ahead[:] = b"\x99" * 1024
    vm.set_regs(rcx=rcx)
    vm.run(pio=b"\x11\x22\x33")
    assert vm.mem(0x8000, 5) == stored
    assert (vm.left, vm.reg("rcx"), vm.machine.pio.count) == (False, left, 0)


def test_userspace_makes_rcx_zero():
    """With RCX = 0 the instruction does not look at the port: userspace is asked the same for ever."""
    vm = enter("io-string", code="f36c", rcx=3, rdx=0x60, rdi=0x8000)
    vm.set_regs(rcx=0)
    for _ in range(3):
        vm.run(pio=b"\x11\x22\x33")
        assert io(vm) == ("in", 0x60, 1, 3)
    assert vm.mem(0x8000, 3) == bytes(3)


def test_the_buffer_keeps_the_last_answer():
    vm = enter("io-string", code="f36c", rcx=3, rdx=0x60, rdi=0x8000)
    vm.run(pio=b"\x11\x22\x33")
    assert bytes(vm.machine.pio.read_ahead[:4]) == b"\x11\x22\x33\0"


def test_trace_of_ports():
    vm = enter("io-string", code="66f36d", rcx=2, rdx=0x60, rdi=0x8000, trace=True, port_in=PORT_BYTES)
    vm.finish()
    events = [event.fields for event in vm.vcpu.trace.events if event.name == "kvm_pio"]
    assert events == [{"rw": "read", "port": 0x60, "size": 2, "count": 2, "val": 0x0201}]
