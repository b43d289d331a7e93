"""What can be wrong with a campaign directory."""

from __future__ import annotations


class StoreError(Exception):
    """A campaign directory that cannot be used; the message names it and the reason."""
