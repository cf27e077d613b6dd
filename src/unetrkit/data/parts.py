"""One part of a list of cases: what one job of an array does."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from unetrkit.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Part `number` of `parts`, counted from 1.

    >>> [Part.read(f"{k}/3").of("abcdefg") for k in (1, 2, 3)]
    ['adg', 'be', 'cf']
    """

    number: int
    parts: int

    @classmethod
    def read(cls, text: str) -> Self:
        """From words such as `3/16`. Raises UserError for any other."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"`{text}` is not a part", hint="write the third of 16 parts as 3/16")
        return cls(int(found[1]), int(found[2]))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `parts`-th item: neighbours in a list are often of one size, and so every part is as long."""
        return items[self.number - 1 :: self.parts]
