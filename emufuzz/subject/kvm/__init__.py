"""The subject that enters KVM's emulator through a VM exit: `KvmSubject`."""

from emufuzz.subject.kvm.subject import KvmSubject

__all__ = ["KvmSubject"]
