"""Who has which shard: a machine without I/O. Its shell (`push.py`) writes down what it decides before anybody is told.

    free ---claim---> claimed ---hold---> held
      ^                  |
      +---- lapses ------+         (no word of the taker for `patience_s`)

Invariants:
    1. A shard is free, claimed by one taker, or held by one.
    2. A taker has at most one claim.
    3. A shard that is held stays so.
    4. One who says that it holds a shard has claimed it before. Where it did so in vain, as another holds it by then, it is told. Of one that is
       claimed by another, that claim ends: who has it goes before who is still fetching it.
    5. From one address there are at most `most_of_one` claims.

Not here: whether a taker really keeps what it says it holds. Nobody can know.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

MOST_OF_ONE: Final = 16
PAST_KEPT: Final = 8
"""Takers of one shard that are remembered, the newest."""

Outcome = Literal["held", "other", "stranger"]


@dataclass(slots=True)
class _Claim:
    taker: bytes
    address: str
    until_s: float


@final
class Dispatch:
    """See the module's text."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        patience_s: float,
        now_s: float,
        held: Mapping[int, bytes] | None = None,
        past: Iterable[tuple[int, bytes]] = (),
        most_of_one: int = MOST_OF_ONE,
    ) -> None:
        """
        Args:
            sizes: bytes of each shard.
            patience_s: how long a claim lasts without a word of its taker.
            now_s: by a clock that only rises.
            held: shard -> taker, of a life before.
            past: claims of a life before, (shard, taker), the newest last: they begin anew.
            most_of_one: claims from one address.
        """
        self._sizes, self._patience_s, self._most_of_one = tuple(sizes), patience_s, most_of_one
        self._held = dict(held or {})
        self._past: dict[int, list[bytes]] = {}
        self._claims: dict[int, _Claim] = {}
        for shard, taker in past:
            self._remember(shard, taker)
        for shard, takers in self._past.items():
            if shard not in self._held and self._claimed(takers[-1]) is None:
                self._claims[shard] = _Claim(takers[-1], "", now_s + patience_s)

    @property
    def num_held(self) -> int:
        """Shards that are in a store."""
        return len(self._held)

    @property
    def num_claimed(self) -> int:
        """Shards that are on their way."""
        return len(self._claims)

    @property
    def is_done(self) -> bool:
        """Whether every shard is held."""
        return len(self._held) == len(self._sizes)

    def snapshot(self) -> dict[int, tuple[str, bytes]]:
        """Shard -> what it is, and whose, for those that are not free."""
        claimed = {shard: ("claimed", claim.taker) for shard, claim in self._claims.items()}
        return claimed | {shard: ("held", taker) for shard, taker in self._held.items()}

    def claim(self, taker: bytes, address: str, *, room_bytes: int, now_s: float) -> int | Literal["wait", "too large"]:
        """A shard for a taker: the one it has a claim to, else one that it began before, else a free one that fits."""
        for shard in [shard for shard, claim in self._claims.items() if claim.until_s <= now_s]:
            del self._claims[shard]
        mine = self._claimed(taker)
        if mine is not None and self._sizes[mine] <= room_bytes:
            self._claims[mine].address = address
            self._claims[mine].until_s = now_s + self._patience_s
            return mine
        if mine is not None:
            del self._claims[mine]  # it has less room now
        left = [s for s, size in enumerate(self._sizes) if s not in self._held and size <= room_bytes]
        if not left:
            return "too large"
        free = [shard for shard in left if shard not in self._claims]
        from_there = Counter(claim.address for claim in self._claims.values())[address]
        if not free or from_there >= self._most_of_one:
            return "wait"
        chosen = next((shard for shard in free if taker in self._past.get(shard, ())), free[0])
        self._claims[chosen] = _Claim(taker, address, now_s + self._patience_s)
        self._remember(chosen, taker)
        return chosen

    def touch(self, shard: int, taker: bytes, *, now_s: float) -> bool:
        """A taker is at work on a shard; whether that is claimed by it."""
        claim = self._claims.get(shard)
        if claim is None or claim.taker != taker:
            return False
        claim.until_s = now_s + self._patience_s
        return True

    def may_hold(self, shard: int, taker: bytes) -> Outcome:
        """What `hold` would answer; changes nothing."""
        if shard in self._held:
            return "held" if self._held[shard] == taker else "other"
        return "held" if taker in self._past.get(shard, ()) else "stranger"

    def hold(self, shard: int, taker: bytes) -> Outcome:
        """A taker says that a shard is in its store."""
        outcome = self.may_hold(shard, taker)
        if outcome == "held":
            self._held[shard] = taker
            self._claims.pop(shard, None)
        return outcome

    def _claimed(self, taker: bytes) -> int | None:
        return next((shard for shard, claim in self._claims.items() if claim.taker == taker), None)

    def _remember(self, shard: int, taker: bytes) -> None:
        takers = self._past.setdefault(shard, [])
        if taker in takers:
            takers.remove(taker)
        takers.append(taker)
        del takers[:-PAST_KEPT]
