"""One object for equal values, so that engines may keep what they derive from it by identity."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Values kept per cache; a full cache is emptied.
_CACHE_SIZE: Final = 4096


class Intern(Generic[T]):
    """A bounded cache of immutable values; calling it gives the value that stands for all equal ones."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[T, T] = {}

    def __call__(self, value: T) -> T:
        """The value that stands for all values equal to this one."""
        values = self._values
        if len(values) >= _CACHE_SIZE:
            values.clear()
        return values.setdefault(value, value)
