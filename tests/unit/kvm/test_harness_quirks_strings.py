"""Quirks of repeated instructions and ports, reached through real exits."""

from __future__ import annotations

import pytest
from support.machines import DB, accesses, enter, exits, mmio, reg, run_path, unenterable

from emufuzz.kvm.vcpu import KVM_REQ_EVENT

TF, RF, DF = 1 << 8, 1 << 16, 1 << 10
PORT_BYTES = bytes(range(1, 33))


@pytest.mark.parametrize(
    ("code", "rcx", "reads", "rax"),
    [
        ("f3e460", 5, 5, 0x01),  # IN AL, imm8
        ("f2ed", 3, 6, 0x0201),  # IN AX, DX: 3 elements of 2 bytes, the first one counts
        ("e460", 5, 1, 0x01),  # without the prefix
        ("f3e460", 0, 1, 0x01),
    ],
)
def test_quirk_46_rep_in_reads_the_port_many_times(code, rcx, reads, rax):
    """REP is ignored on IN (SDM Vol. 2B REP: string instructions only): one read, RCX unchanged."""
    code = code.replace("ed", "66ed")
    outcome = run_path("fep", code=code, rcx=rcx, rdx=0x60, port_in=PORT_BYTES)
    assert sum(len(data) // 2 for _, _, data in accesses(outcome)) == reads
    assert (reg(outcome, "rax"), reg(outcome, "rcx")) == (rax, rcx)
    assert exits(outcome) == ["IO"]


def test_quirk_46_the_exit_of_in_reads_once():
    """The same instruction by its own exit has no emulator in between and is as on hardware."""
    outcome = run_path("exit", code="f3e460", rcx=5, port_in=PORT_BYTES)
    assert accesses(outcome) == [("read", 0x60, "01")]


@pytest.mark.parametrize("path", ["io-string", "fep", "io-completion"])
def test_quirk_48_rep_ins_loses_data_at_a_bad_destination(path):
    """Hardware checks the destination before it reads the port (SDM Vol. 2A INS); nothing is lost."""
    vm = enter(path, code="f36c", rdi=0xE000, rcx=3, rdx=0x60, port_in=PORT_BYTES)
    assert (vm.exit.exit_reason, vm.exit.data["count"]) == ("IO", 3)
    outcome = vm.finish()
    assert len(accesses(outcome)) == 3
    assert outcome.exception == (14, 2, 0xE000)
    assert reg(outcome, "rcx") == 3  # the guest repeats all three with what the port says next


def test_quirk_48_what_was_read_ahead_is_lost_when_the_page_ends():
    """DF = 1 stores element by element; the room in the page is in bytes, so four words seem to fit.

    Hardware reads the port once for each element it can store (SDM Vol. 2A INS).
    """
    outcome = run_path("io-string", code="66f36d", rdi=0xE004, rcx=4, rdx=0x60, flags=DF,
                       port_in=PORT_BYTES, data={0xE000: b""})  # fmt: skip
    assert [data for _, _, data in accesses(outcome)] == ["0102", "0304", "0506", "0708"]
    assert outcome.exception == (14, 2, 0xDFFE)
    assert outcome.pages[0xE][:6].hex() == "050603040102"
    assert reg(outcome, "rcx") == 1  # the last word is read again, and is another one


def test_quirk_49_rep_movs_steps_once_in_1024_iterations():
    """With TF every iteration traps (SDM Vol. 3B 17.3.1.4); here one #DB after 1024."""
    outcome = run_path("fep", code="f3a4", rsi=0x8000, rdi=0x9000, rcx=0x800, flags=TF)
    assert outcome.restarts == 1023
    assert outcome.exception == (DB, None, None)
    assert (outcome.rip, reg(outcome, "rcx")) == (0x6005, 0x400)
    assert outcome.rflags & RF


@pytest.mark.parametrize(("rcx", "restarts", "rip"), [(3, 2, 0x6005), (0x401, 0, 0x6005), (0, 0, 0x6007)])
def test_quirk_49_iterations_end_at_multiples_of_1024(rcx, restarts, rip):
    """How many iterations run without a stop depends on RCX alone; hardware traps after each.

    Not even the last iteration moves RIP: the guest executes the instruction again with RCX = 0.
    """
    outcome = run_path("fep", code="f3aa", rdi=0x8000, rcx=rcx, flags=TF)
    assert (outcome.restarts, outcome.rip) == (restarts, rip)
    assert len(outcome.extra["injected"]) == 1


def test_quirk_49_no_event_comes_between_iterations():
    """Interrupts are taken after any iteration (SDM Vol. 2B REP); a request for one waits here."""
    vm = enter("invalid-guest-state", "prot32", "90", **unenterable())
    machine = vm.machine
    vm.set_regs(rip=0x6000, rcx=0x200, rdi=0x8000)
    vm.vcpu.requests = {KVM_REQ_EVENT}
    machine.restarts = 0
    vm.machine.mmu.slots.write_guest(0x6000, b"\xf3\xaa")
    assert machine.emulate(0) == 1
    assert (machine.restarts, vm.reg("rcx")) == (0x1FF, 0)
    assert vm.vcpu.requests == {KVM_REQ_EVENT}


def test_quirk_58_out_is_complete_before_userspace_sees_it():
    """OUT ends when the device has taken the data (SDM Vol. 1 19.6); here RIP is past it at the exit."""
    vm = enter("fep", code="e660", rax=0x7)
    assert (vm.exit.exit_reason, vm.exit.data["data"]) == ("IO", b"\x07")
    assert vm.rip == 0x6007
    assert (vm.vcpu.complete_userspace_io, vm.machine.pio.count) == (None, 0)


def test_quirk_58_the_exit_of_out_waits_for_userspace():
    """Without the emulator RIP moves only when userspace comes back."""
    vm = enter("exit", code="e660", rax=0x7)
    assert (vm.rip, vm.run().rip) == (0x6000, 0x6002)


def test_quirk_58_the_single_step_of_out_is_lost():
    """#DB follows OUT with TF (SDM Vol. 3B 17.3.1.4); the emulator steps only if the guest goes on."""
    vm = enter("fep", code="e660", rax=0x7, flags=TF)
    assert vm.rip == 0x6007
    assert vm.pending is None
    vm.run()
    assert vm.pending is None


def test_quirk_58_outs_too_and_a_write_to_a_device():
    """Every store to a device is posted like this, so its #DB is lost as well."""
    outs = enter("io-string", code="6e", rsi=0x8000, rdx=0x60, flags=TF)
    store = enter("ept-violation", code="8807", rdi=0xB000, devices=[mmio()], flags=TF)
    assert (outs.rip, outs.run().pending) == (0x6001, None)
    assert (store.rip, store.run().pending) == (0x6002, None)
