"""The fuzzer: generation of cases, campaigns, workers, findings."""
