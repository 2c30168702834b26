"""What the formats of affine codes can store."""

from dataclasses import dataclass

from torch import Tensor

from quant.errors import BadSource
from quant.scheme import Scheme

GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is written: the combinations that the known readers have code for."""

    schemes: frozenset[tuple[int, bool]]  # (bits, symmetric)
    groups: tuple[int | None, ...]
    in_words: bool = False  # whether input columns fill 32-bit words
    out_words: bool = False  # whether output rows fill 32-bit words

    def refuse(self, name: str, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        if scheme is None:
            return f"{name} needs bits and a group size"
        if (scheme.bits, scheme.symmetric) not in self.schemes:
            known = ", ".join(_kind(*each) for each in sorted(self.schemes))
            return f"{name} stores {known} codes, not {_kind(scheme.bits, scheme.symmetric)}"
        if scheme.group not in self.groups:
            return f"{name} stores {_groups(self.groups)}, not {_groups((scheme.group,))}"
        return self._refuse_shape(name, shape, scheme)

    def _refuse_shape(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        out, columns = shape
        each = 32 // scheme.bits
        if scheme.group and columns % scheme.group:
            return f"{columns:,} input columns do not divide into groups of {scheme.group}"
        if self.in_words and columns % each:
            return f"{name} packs {each} codes along the input; {columns:,} columns are no multiple of that"
        if self.out_words and out % each:
            return f"{name} packs {each} codes along the output; {out:,} rows are no multiple of that"
        return None


def _kind(bits: int, symmetric: bool) -> str:
    return f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'}"


def _groups(groups: tuple[int | None, ...]) -> str:
    sizes = [str(group) for group in groups if group is not None]
    words = [f"groups of {' or '.join(sizes)}"] if sizes else []
    return " and ".join(words + ["one scale a row"] * (None in groups))


def whole_groups(shape: tuple[int, int], scheme: Scheme | None) -> Scheme:
    """The scheme, if a layer of that shape can have it at all. Raises BadSource."""
    if scheme is None or scheme.bits not in (4, 8):
        raise BadSource("only codes of 4 or 8 bits are read")
    if shape[1] % scheme.width(shape[1]):
        raise BadSource(f"{shape[1]:,} input columns do not divide into groups of {scheme.group}")
    return scheme


def middle_everywhere(zeros: Tensor, scheme: Scheme) -> None:
    """Raises BadSource for a layer that is said to be symmetric and is not."""
    if scheme.symmetric and not bool((zeros == scheme.middle).all()):
        raise BadSource(f"the zero points of a symmetric layer are not all {scheme.middle}")
