"""Groups whose updates nobody sees: the machine of an Edge's secure groups for one task.

It answers the same round as `ClearGroups` and keeps its invariants (group.py, cited by number); what differs is how members come into a sum.
A member that has its update ready *waits*. When `size` of one version wait, or as many as the round still lacks, a secure group is made of
them: `Form`. Its keys, shares and masks are the business of `forming.py`, outside of this machine, which is told how it ended: `Formed` (the
sum of the survivors is there, and counts whole) or `Broke` (there is none). So there is no check and no queue: a group is in the sum or not.

Further invariants:
    (9) A member is in one forming group at most, and no group forms of fewer than can be secure (`fits`).
    (10) Who has revealed shares (is *spent*) never waits again with the same update: it ends counted or refused.
    (11) A close waits for the groups that are forming, and forms what can be formed of those that wait.

One member's way::

    Joined─> joined ─Offered─> waiting ─(enough wait)─> forming ─Formed─> added ─Stored/Committed─> counted
                                 ^                       └─Broke, lost: moved (may offer again), spent: refused
    joined, waiting ─Close / too late / Gone─> released
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.errors import InvalidTransition
from shoal.fleet import group as g
from shoal.fleet.group import Member
from shoal.policy import RoundPolicy


@dataclass(slots=True)
class _Group:
    version: int
    """Whose sum it is part of."""
    trained_on: int
    members: tuple[bytes, ...]
    is_formed: bool = field(default=False)


class SecureGroups:
    """See the module's text."""

    def __init__(self, policy: RoundPolicy, *, most: int, size: int, fits: Callable[[int], bool]) -> None:
        """
        Args:
            policy: of the task's rounds.
            most: members that fit the sum of one version.
            size: members of a group, at most.
            fits: whether so many members can be a secure group; true for `size`.
        """
        self._policy, self._most, self._size, self._fits = policy, most, size, fits
        self._version = -1
        self._is_open = self._is_ending = False
        self._states: dict[bytes, Member] = {}
        self._versions: dict[bytes, int] = {}  # of those that are in no group
        self._waiting: list[bytes] = []
        self._groups: dict[int, _Group] = {}
        self._num_groups = 0
        self._room: dict[int, int] = {}  # version -> members that its sum has room for
        self._closing: g.Close | None = None
        self._closed: tuple[int, ...] = ()

    def state(self, nonce: bytes) -> Member | None:
        return self._states.get(nonce)

    def base_version(self, group: int) -> int:
        return self._groups[group].version

    def members(self, group: int) -> tuple[bytes, ...]:
        return self._groups[group].members

    def takes(self, version: int) -> bool:
        """Whether a member on that version may still join."""
        return self._is_open and 0 <= self._version - version <= self._policy.max_staleness

    def step(self, event: g.Event, now_s: float) -> list[g.Command]:
        """Advances by one event."""
        del now_s  # a secure group's deadlines are its own
        match event:
            case g.Open(version, taken):
                self._room |= {of: self._most - members for of, members in taken}
                return self._open(version)
            case g.Joined(nonce, version):
                return self._join(nonce, version)
            case g.Offered(nonce) if self._states.get(nonce) is Member.JOINED:
                self._states[nonce] = Member.OFFERED
                self._waiting.append(nonce)
                return self._form()
            case g.Offered(nonce) if nonce in self._states:
                return []
            case g.Offered(nonce):
                return [g.Tell(nonce, "refused", reason="late", detail="The round has closed.")]
            case g.Formed(group, survivors) if self._is_forming(group):
                return self._formed(group, survivors)
            case g.Broke(group, spent, why) if self._is_forming(group):
                return self._broke(group, spent, why)
            case g.Gone(nonce, _):
                return self._drop(nonce)
            case g.Dissolve():
                return self._dissolve()
            case g.Close() if self._closing is None:
                return self._close(event)
            case g.Stored():
                return self._end("counted", 0)
            case g.Committed(version):
                self._is_open = self._is_ending = False
                return self._end("counted", version)
            case g.Failed(why):
                return self._fail(why)
        raise InvalidTransition(f"{event} is not allowed; open: {self._is_open}, closing: {self._closing}.")

    # Rounds.

    def _open(self, version: int) -> list[g.Command]:
        assert self._closing is None, "a close ends before the next round opens"
        again = version == self._version and self._is_open
        self._version, self._is_open = version, True
        if again:
            return []
        told: list[g.Command] = []
        for nonce, trained_on in list(self._versions.items()):
            if not self.takes(trained_on):
                told += self._release(nonce, "too late")
        self._room = {v: room for v, room in self._room.items() if version - v <= self._policy.max_staleness}
        self._room.setdefault(version, self._most)
        return told + self._form()

    def _close(self, close: g.Close) -> list[g.Command]:
        self._closing, self._is_ending = close, close.final
        told: list[g.Command] = []
        if close.final and not self._policy.max_staleness:
            for nonce in [n for n, state in self._states.items() if state is Member.JOINED]:
                told += self._release(nonce, "the round has what it needs")
        return told + (self._form() if close.final else []) + self._finish_closing()

    def _finish_closing(self) -> list[g.Command]:
        close = self._closing
        if close is None or (close.final and any(not group.is_formed for group in self._groups.values())):
            return []
        self._closing = None
        told: list[g.Command] = []
        if close.final and not self._policy.max_staleness:
            for nonce in list(self._waiting):  # too few for a group
                told += self._release(nonce, "the round has what it needs")
        self._closed = tuple(
            number for number, group in self._groups.items()
            if group.is_formed and (close.final or group.version == self._version)
        )  # fmt: skip
        return [*told, g.Closed(self._closed)]

    def _end(self, outcome: str, version: int, *, reason: str = "", detail: str = "") -> list[g.Command]:
        told: list[g.Command] = []
        for number in self._closed:
            for nonce in self._groups.pop(number).members:
                del self._states[nonce]
                told.append(g.Tell(nonce, outcome, version=version, reason=reason, detail=detail))
        self._closed = ()
        return told

    def _fail(self, why: str) -> list[g.Command]:
        gone: list[g.Command] = []
        for number in self._closed:
            self._room[self._groups[number].version] += len(self._groups[number].members)
            if not self._is_ending:  # else the round begins anew, and forgets everybody
                gone += [g.ReleaseMember(nonce) for nonce in self._groups[number].members]
        if self._is_ending:
            self._is_open = self._is_ending = False
        return self._end("refused", 0, reason="failed", detail=why) + gone

    # Members.

    def _join(self, nonce: bytes, version: int) -> list[g.Command]:
        if nonce in self._states:
            return []
        if not self.takes(version) or (self._is_ending and not self._policy.max_staleness):
            return [g.Tell(nonce, "released", reason="the round has what it needs")]
        self._states[nonce], self._versions[nonce] = Member.JOINED, version
        return [g.JoinRound(nonce, version)]

    def _drop(self, nonce: bytes) -> list[g.Command]:
        if self._states.get(nonce) in (Member.JOINED, Member.OFFERED):
            self._forget(nonce)
            return [g.ReleaseMember(nonce)]
        return []  # of one that is forming its group says what became of it

    def _dissolve(self) -> list[g.Command]:
        if self._closing is not None or self._closed or self._groups:
            return []
        commands: list[g.Command] = []
        for nonce in list(self._versions):
            self._forget(nonce)
            commands += [g.Tell(nonce, "moved"), g.ReleaseMember(nonce)]
        return commands

    def _release(self, nonce: bytes, why: str) -> list[g.Command]:
        self._forget(nonce)
        return [g.Tell(nonce, "released", reason=why), g.ReleaseMember(nonce)]

    def _forget(self, nonce: bytes) -> None:
        del self._states[nonce]
        self._versions.pop(nonce, None)
        if nonce in self._waiting:
            self._waiting.remove(nonce)

    # Groups.

    def _form(self) -> list[g.Command]:
        """Groups of those that wait: of `size`, of as many as the round lacks, and at its end of as many as there are."""
        is_ending = self._closing is not None and self._closing.final
        if not self._is_open or (self._is_ending and not is_ending):
            return []
        made: list[g.Command] = []
        for trained_on in sorted({self._versions[nonce] for nonce in self._waiting}, reverse=True):
            version = trained_on if self._policy.late.kind == "patch" else self._version
            waiting = [nonce for nonce in self._waiting if self._versions[nonce] == trained_on]
            while waiting:
                room = self._room.setdefault(version, self._most)
                count = min(self._size, len(waiting), room)
                lacking = self._policy.commit_at - (self._most - room)
                is_enough = count >= self._size or 0 < lacking <= count or is_ending
                if not is_enough or not self._fits(count):
                    break
                made.append(self._begin(tuple(waiting[:count]), trained_on, version))
                waiting = waiting[count:]
        return made

    def _begin(self, nonces: tuple[bytes, ...], trained_on: int, version: int) -> g.Form:
        self._num_groups += 1
        self._groups[self._num_groups] = _Group(version, trained_on, nonces)
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
        group.members, group.is_formed = survivors, True
        self._room[group.version] += len(lost)
        told: list[g.Command] = []
        for nonce in survivors:
            self._states[nonce] = Member.ADDED
            told.append(g.CountMember(nonce, self._version - group.trained_on))
        return told + self._move(lost) + self._form() + self._finish_closing()

    def _broke(self, number: int, spent: tuple[bytes, ...], why: str) -> list[g.Command]:
        group = self._groups.pop(number)
        self._room[group.version] += len(group.members)
        told: list[g.Command] = []
        for nonce in [nonce for nonce in group.members if nonce in set(spent)]:
            self._forget(nonce)
            told += [g.Tell(nonce, "refused", reason="spent", detail=why), g.ReleaseMember(nonce)]
        rest = [nonce for nonce in group.members if nonce not in set(spent)]
        return told + self._move(rest) + self._form() + self._finish_closing()

    def _move(self, nonces: list[bytes]) -> list[g.Command]:
        """They revealed nothing: they may offer the same update again, under fresh keys."""
        told: list[g.Command] = []
        for nonce in nonces:
            self._forget(nonce)
            told += [g.Tell(nonce, "moved"), g.ReleaseMember(nonce)]
        return told
