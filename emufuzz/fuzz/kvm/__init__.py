"""Generation of cases that enter KVM through a VM exit, and what became of them."""
