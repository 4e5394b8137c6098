"""Groups whose updates nobody sees: the machine of an Edge's secure groups for one task.

It answers the same round as `ClearGroups` and keeps its invariants (group.py, cited by number); what differs is how members come into a sum.
A member that has its update ready *waits*, and counts for the round, which closes when enough do; then, or when `size` of one version wait
before, a secure group is made of them: `Form`. Its keys, shares and masks are the business of `forming.py`, outside of this machine, which is told how it ended: `Formed` (the
sum of the survivors is there, and counts whole) or `Broke` (there is none). So there is no check and no queue: a group is in the sum or not.

Further invariants:
    (9) A member is in one forming group at most, and no group forms of fewer than can be secure (`fits`).
    (10) Who has revealed shares (is *spent*) never waits again with the same update: it ends counted or refused.
    (11) A close waits for the groups that are forming, and forms what can be formed of those that wait.

One member's way::

    Joined─> joined ─Offered─> waiting ─(enough wait)─> forming ─Formed─> added ─Stored/Committed─> counted
                                 ^                       └─Broke, lost: moved (may offer again), spent: refused
    joined, waiting ─Close / too late / Gone─> released

So fewer may be in a version than the round has counted: those that were lost in forming are released.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from shoal.fleet import group as g
from shoal.fleet.group import Group, Groups, Member
from shoal.policy import RoundPolicy


@dataclass(slots=True)
class _SecureGroup(Group):
    trained_on: int = 0
    is_formed: bool = False


class SecureGroups(Groups):
    """See the module's text."""

    _groups: dict[int, _SecureGroup]  # type: ignore[assignment]

    def __init__(self, policy: RoundPolicy, *, most: int, size: int, fits: Callable[[int], bool]) -> None:
        """
        Args:
            policy: of the task's rounds.
            most: members that fit the sum of one version.
            size: members of a group, at most.
            fits: whether so many members can be a secure group; true for `size`.
        """
        super().__init__(policy, most=most)
        self._size, self._fits = size, fits
        self._waiting: list[bytes] = []
        self._counted: set[bytes] = set()  # of those that wait or are forming: the round knows of them

    def _step(self, event: g.Event) -> list[g.Command] | None:
        match event:
            case g.Formed(group, survivors) if self._is_forming(group):
                return self._formed(group, survivors)
            case g.Broke(group, spent, why) if self._is_forming(group):
                return self._broke(group, spent, why)
        return None

    def _offered(self, nonce: bytes) -> list[g.Command]:
        self._waiting.append(nonce)
        return self._count() + self._form()

    # Rounds.

    def _after_open(self) -> list[g.Command]:
        return self._count() + self._form()

    def _fail(self, why: str) -> list[g.Command]:
        if self._is_ending:
            self._counted.clear()  # the round begins anew, and has forgotten them
        return super()._fail(why)

    def _finish_closing(self) -> list[g.Command]:
        close = self._closing
        if close is None:
            return []
        told = self._form() if close.final else []
        if close.final and any(not group.is_formed for group in self._groups.values()):
            return told
        self._closing = None
        if close.final and not self._policy.max_staleness:
            for nonce in list(self._waiting):  # too few for a group
                told += self._release(nonce, g.NO_NEED)
        self._closed = tuple(
            number for number, group in self._groups.items()
            if group.is_formed and (close.final or group.version == self._version)
        )  # fmt: skip
        return [*told, g.Closed(self._closed)]

    def _dissolve(self) -> list[g.Command]:
        if self._closing is not None or self._closed or self._groups:
            return []
        commands: list[g.Command] = []
        for nonce in list(self._versions):
            self._forget(nonce)
            commands += [g.Tell(nonce, "moved"), g.ReleaseMember(nonce)]
        return commands

    def _forget(self, nonce: bytes) -> None:
        super()._forget(nonce)
        self._counted.discard(nonce)
        if nonce in self._waiting:
            self._waiting.remove(nonce)

    def _count(self) -> list[g.Command]:
        """Tells the round of those that wait, so that it closes when enough do: a group is made of them then.

        Those of the present version count at once, as their numbers grow together; of others, and where there is a buffer, only so many
        of one version as can be a group.
        """
        told: list[g.Command] = []
        together = Counter(self._versions[nonce] for nonce in self._waiting)
        for nonce in self._waiting:
            trained_on = self._versions[nonce]
            is_present = trained_on == self._version and not self._policy.buffer
            if nonce not in self._counted and (is_present or together[trained_on] >= self._policy.minimum_group):
                self._counted.add(nonce)
                told.append(g.CountMember(nonce, self._version - trained_on))
        return told

    # Groups.

    def _form(self) -> list[g.Command]:
        """Groups of those that wait: of `size`; at a round's end of as many as there are, about as many in each."""
        is_ending = self._closing is not None and self._closing.final
        if not self._is_open or (self._is_ending and not is_ending):
            return []
        made: list[g.Command] = []
        for trained_on in sorted({self._versions[nonce] for nonce in self._waiting}, reverse=True):
            version = self._sum_of(trained_on)
            waiting = [nonce for nonce in self._waiting if self._versions[nonce] == trained_on]
            while count := self._next_size(
                len(waiting), self._room.setdefault(version, self._most), is_ending=is_ending
            ):
                made.append(self._begin(tuple(waiting[:count]), trained_on, version))
                waiting = waiting[count:]
        return made

    def _next_size(self, waiting: int, room: int, *, is_ending: bool) -> int:
        """Members of the next group of so many that wait; 0: there is none."""
        most = min(waiting, room)
        if not is_ending:
            return self._size if most >= self._size else 0
        even = ceil(most / max(1, ceil(most / self._size)))
        return next((count for count in (even, min(most, self._size)) if count and self._fits(count)), 0)

    def _begin(self, nonces: tuple[bytes, ...], trained_on: int, version: int) -> g.Form:
        self._num_groups += 1
        self._groups[self._num_groups] = _SecureGroup(version, list(nonces), trained_on=trained_on)
        self._room[version] -= len(nonces)
        for nonce in nonces:
            self._waiting.remove(nonce)
            del self._versions[nonce]
            self._states[nonce] = Member.ADDING
        return g.Form(self._num_groups, nonces, self._policy.discount(self._version - trained_on))

    def _is_forming(self, number: int) -> bool:
        return number in self._groups and not self._groups[number].is_formed

    def _formed(self, number: int, survivors: tuple[bytes, ...]) -> list[g.Command]:
        group = self._groups[number]
        assert set(survivors) <= set(group.members) and self._fits(len(group.members))
        lost = [nonce for nonce in group.members if nonce not in set(survivors)]
        group.members, group.is_formed = list(survivors), True
        self._room[group.version] += len(lost)
        told: list[g.Command] = []
        for nonce in survivors:
            self._states[nonce] = Member.ADDED
            if nonce not in self._counted:
                told.append(g.CountMember(nonce, self._version - group.trained_on))
            self._counted.discard(nonce)
        return told + self._move(lost, "it was lost in its secure group") + self._form() + self._finish_closing()

    def _broke(self, number: int, spent: tuple[bytes, ...], why: str) -> list[g.Command]:
        group = self._groups.pop(number)
        self._room[group.version] += len(group.members)
        told: list[g.Command] = []
        for nonce in [nonce for nonce in group.members if nonce in set(spent)]:
            self._forget(nonce)
            told += [g.Tell(nonce, "refused", reason="spent", detail=why), g.ReleaseMember(nonce)]
        rest = [nonce for nonce in group.members if nonce not in set(spent)]
        return (
            told + self._move(rest, f"its secure group came to nothing: {why}") + self._form() + self._finish_closing()
        )

    def _move(self, nonces: list[bytes], why: str) -> list[g.Command]:
        """They revealed nothing: they may offer the same update again, under fresh keys."""
        told: list[g.Command] = []
        for nonce in nonces:
            self._forget(nonce)
            told += [g.Tell(nonce, "moved", reason=why), g.ReleaseMember(nonce)]
        return told
