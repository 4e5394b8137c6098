"""Who shares secrets with whom, and how many shares give one back.

Members stand in a circle, in an order that nobody chose: it follows from the roster by a hash. Each shares with the `degree` members
next to it, half on either side (a Harary graph; all with all where the group is small). `find` looks for the smallest degree, and a
threshold, such that for stated numbers of colluders and drop-outs, wherever they stand (Bell et al. 2020, section 3.3;
the tails here are exact, hypergeometric, and added up over all members):

    * Privacy, but for a chance of 2^-40: of each member's neighbours at most threshold - minimum collude. So colluders alone never have the
      threshold, and every secret that is given back had `minimum` honest members reveal a share of it.
    * Connection, but for 2^-40: the honest members that survive are one piece. It could fall apart only if half a degree of members in a row
      were missing at two places of the circle. (Else the server would learn the sum of each piece; each has more than `minimum` honest members.)
    * Correctness, but for 2^-20: of each member's neighbours at least threshold survive.

With all with all the numbers are certain, not likely. *Certified* groups, whose server may lie, are always all with all: such a server would try
group numbers until the circle stands colluders around its victim, and it chooses who drops out. It also chooses whose shares a member gets
before it masks: as many as it likes above the threshold, and can say afterwards that those were lost. So the threshold is higher there: of those
who reveal a share of a member at least minimum - 1 are honest and have masked with it, as threshold - colluders - (members - 1 - threshold) is that.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, floor
from typing import Final

from shoal import validate

PRIVACY_BITS: Final = 40
CORRECTNESS_BITS: Final = 20
MAX_MEMBERS: Final = 1000
"""Of a group. More members are several groups."""
ROSTER_BYTES: Final = 60_000
"""Of a member's roster, which is one message of a session: 32 bytes a member, at most `NEIGHBOUR_BYTES` a neighbour."""
NEIGHBOUR_BYTES: Final = 287


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What a group withstands."""

    colluders: float = 0.1
    """Share of the members, at most, that tell the server all they know."""
    dropouts: float = 0.3
    """Share of the members, at most, that stop at any time."""

    def __post_init__(self) -> None:
        validate.types(self)
        for name in ("colluders", "dropouts"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected 0 <= {name} < 1, a share of the members, got {getattr(self, name)}.")
        if self.colluders + self.dropouts >= 1:
            raise ValueError(
                f"Expected colluders + dropouts < 1, got {self.colluders} + {self.dropouts}: nobody honest would remain."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """The numbers of a group."""

    members: int
    colluders: int
    """Members, at most."""
    dropouts: int
    minimum: int
    """Honest members in whatever the server learns, at least."""
    degree: int
    threshold: int

    @property
    def is_complete(self) -> bool:
        return self.degree == self.members - 1

    @property
    def least_survivors(self) -> int:
        """With fewer no sum is revealed."""
        return max(self.members - self.dropouts, self.minimum + self.colluders)

    @property
    def least_signatures(self) -> int:
        """Of members on one set of survivors, so that there is no second set with as many: colluders sign both."""
        return (self.members + self.colluders) // 2 + 1


@lru_cache(256)
def find(members: int, assumptions: Assumptions, minimum: int, certified: bool = False) -> Graph:
    """The graph of a group of so many members.

    Args:
        members: of the group.
        assumptions: what it withstands.
        minimum: honest members in whatever the server learns.
        certified: whether the server may lie.

    Raises:
        ValueError: there is none; the message says how many members would do.
    """
    validate.positive(minimum=minimum)
    if members > MAX_MEMBERS:
        raise ValueError(
            f"Expected groups of at most {MAX_MEMBERS} members, got {members}. Make several groups of them."
        )
    found = _complete(members, assumptions, minimum, True) if certified else _find(members, assumptions, minimum)
    if found is not None and 32 * members + NEIGHBOUR_BYTES * found.degree > ROSTER_BYTES:
        raise ValueError(
            f"A group of {members} with {assumptions.colluders:.0%} colluders and {assumptions.dropouts:.0%} drop-outs needs "
            f"{found.degree} neighbours for each, more than a message holds. Make smaller groups, or assume fewer of either."
        )
    if found is None:
        enough = next(
            (n for n in range(members + 1, MAX_MEMBERS) if _complete(n, assumptions, minimum, certified)), None
        )
        mend = f"{enough} members would do" if enough else "no number of members would do: assume fewer of either"
        raise ValueError(
            f"A group of {members} cannot have {minimum} honest members in every sum with {assumptions.colluders:.0%} colluders and "
            f"{assumptions.dropouts:.0%} drop-outs; {mend}."
        )
    return found


def _find(members: int, assumptions: Assumptions, minimum: int) -> Graph | None:
    whole = _complete(members, assumptions, minimum, False)
    others, colluders, dropouts = (
        members - 1,
        floor(assumptions.colluders * members),
        floor(assumptions.dropouts * members),
    )
    for degree in range(2, others, 2):
        apart = comb(members, 2) * _chance(
            members, colluders + dropouts, degree, degree
        )  # two runs of half a degree each
        if apart >= Fraction(1, 1 << PRIVACY_BITS):
            continue
        lowest = next(
            (t for t in range(minimum, degree + 1)
             if members * _chance(others, colluders, degree, t - minimum + 1) < Fraction(1, 1 << PRIVACY_BITS)),
            degree + 1,
        )  # fmt: skip
        if lowest > degree or members * _chance(others, dropouts, degree, degree - lowest + 1) >= Fraction(
            1, 1 << CORRECTNESS_BITS
        ):
            continue
        return Graph(
            members=members, colluders=colluders, dropouts=dropouts, minimum=minimum, degree=degree, threshold=lowest
        )  # fmt: skip
    return whole


def _complete(members: int, assumptions: Assumptions, minimum: int, certified: bool) -> Graph | None:
    """All with all, where that is possible; between what privacy asks for and what drop-outs leave the threshold is in the middle."""
    colluders, dropouts = floor(assumptions.colluders * members), floor(assumptions.dropouts * members)
    lowest, highest = colluders + minimum, members - 1 - dropouts
    if certified:
        lowest = max(lowest, -(-(members + colluders + minimum - 2) // 2))
    if lowest > highest:
        return None
    threshold = (lowest + highest) // 2
    return Graph(
        members=members, colluders=colluders, dropouts=dropouts, minimum=minimum, degree=members - 1, threshold=threshold
    )  # fmt: skip


@lru_cache(1 << 16)
def _chance(population: int, marked: int, drawn: int, at_least: int) -> Fraction:
    """That of `drawn` without return at least so many are marked; exact."""
    if at_least <= 0:
        return Fraction(1)
    cases = sum(comb(marked, x) * comb(population - marked, drawn - x) for x in range(at_least, min(marked, drawn) + 1))
    return Fraction(cases, comb(population, drawn))


def neighbours(graph: Graph, roster_digest: bytes) -> Mapping[int, Sequence[int]]:
    """Number -> the numbers of its neighbours, ascending; numbers are 1 to members.

    Args:
        graph: of the group.
        roster_digest: 32 bytes that the order in the circle follows from.
    """
    numbers = range(1, graph.members + 1)
    if graph.is_complete:
        return {number: [other for other in numbers if other != number] for number in numbers}
    circle = sorted(numbers, key=lambda number: hashlib.sha256(roster_digest + number.to_bytes(4, "big")).digest())
    reach = [step for step in range(-graph.degree // 2, graph.degree // 2 + 1) if step]
    return {
        number: sorted(circle[(at + step) % graph.members] for step in reach) for at, number in enumerate(circle)
    }  # fmt: skip
