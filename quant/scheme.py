"""How the numbers of one linear layer are stored, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`group` consecutive input columns of a row share a scale; None: the whole row does (per channel)."""

    bits: int
    group: int | None = 128
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest code. Symmetric schemes, too, have codes 0 to `top`: their zero point is the middle."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns that share a scale in a matrix of so many columns."""
        return self.group or columns

    def groups(self, columns: int) -> int:
        """Scales a row; the last group may be shorter."""
        return -(-columns // self.width(columns))
