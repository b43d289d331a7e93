"""Campaigns whose cases libFuzzer makes, through atheris (docs/atheris.md).

A child process runs libFuzzer over encoded cases with emufuzz.emulator and emufuzz.kvm instrumented; the
driver's side is a pool of workers like any other. Modules of this package import nothing at their top that
would load what is to be instrumented, but for those that say so.
"""
