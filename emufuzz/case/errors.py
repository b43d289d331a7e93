"""Errors about cases that reach the user as one line."""

from __future__ import annotations


class CaseError(ValueError):
    """A case that is not valid; the message names the field and the reason."""


class UnsupportedCaseError(Exception):
    """A case that an engine cannot take; the message names the field and the reason."""
