"""Campaign directories: one SQLite file, which is authoritative, and findings exported as JSON beside it."""

from __future__ import annotations

from emufuzz.fuzz.store.errors import StoreError
from emufuzz.fuzz.store.records import Record
from emufuzz.fuzz.store.store import Store
from emufuzz.fuzz.store.view import StoreView

__all__ = ["Record", "Store", "StoreError", "StoreView"]
