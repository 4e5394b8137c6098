"""Groups that see single updates, held whole until they are checked. The machine says `Check` and `Add`, and is told `Checked` and `Added`.

A member belongs to no group until it is added. One that is on the present version goes into the *present* group; a late
one goes where the policy says: nowhere (discard), into the present group at a discount, or into the group of its own
version (patch), which changes that version's sum as if it had come in time. Invariants stand in `group.py`.

One member's way::

    Joined─> joined ─Offered─> offered ─Checked(ok)─> checked ─(its turn)─> adding ─Added─> added ─Stored/Committed─> counted
    any of the first four ─Refuse / Close / too late / Gone─> refused | released
"""

from collections import deque
from itertools import chain

from shoal.fleet import group as g
from shoal.fleet.group import Group, Groups, Member
from shoal.policy import RoundPolicy


class ClearGroups(Groups):
    """See the module's text."""

    def __init__(self, policy: RoundPolicy, *, most: int, moves_on: bool = True) -> None:
        """`moves_on`: what was added below the minimum counts for the next version; else it is released, as where a device must not be
        in one sum twice."""
        super().__init__(policy, most=most)
        self._moves_on = moves_on
        self._queue: deque[bytes] = deque()
        self._adding: bytes | None = None
        self._present = self._new_group(-1)

    def _step(self, event: g.Event) -> list[g.Command] | None:
        match event:
            case g.Checked(nonce, reason, detail):
                return self._checked(nonce, reason, detail)
            case g.Added(nonce) if nonce == self._adding:
                return self._was_added(nonce)
        return None

    def _offered(self, nonce: bytes) -> list[g.Command]:
        return [g.Check(nonce)]

    def _new_group(self, version: int) -> int:
        self._num_groups += 1
        self._groups[self._num_groups] = Group(version)
        return self._num_groups

    # Rounds.

    def _after_open(self) -> list[g.Command]:
        return self._regroup() + self._add_next()

    def _regroup(self) -> list[g.Command]:
        """Groups that nobody has seen yet: those that can still be patched in stay, the others go into the present one."""
        old, self._present = self._groups, 0
        self._groups = {}
        self._present = self._new_group(self._version)
        merged: list[g.Command] = []
        for number, group in old.items():
            if not group.members:
                continue
            if group.version != self._version and not self._moves_on:
                merged += [g.Drop(number), *chain.from_iterable(self._release(n, g.NO_NEED) for n in group.members)]
            elif self._policy.late.kind == "patch" and self.takes(group.version) and group.version != self._version:
                self._groups[number] = group
            else:
                merged.append(g.Merge(number, self._present))
                self._groups[self._present].members += group.members
                if group.version != self._version:
                    self._room[self._version] -= len(group.members)
        return merged

    def _finish_closing(self) -> list[g.Command]:
        close = self._closing
        if close is None:
            return []
        if not close.final:
            return self._close_full_groups()
        if self._adding is not None:
            return []
        if adding := self._add_next():  # those who have finished are used
            return adding
        if any(state is Member.OFFERED for state in self._states.values()):
            return []  # they are being checked
        self._closing = None
        told: list[g.Command] = []
        for nonce in list(self._queue):  # no room for them
            told += self._release(nonce, g.NO_NEED)
        minimum = self._policy.minimum_group
        self._closed = tuple(n for n, group in self._groups.items() if len(group.members) >= minimum)
        return [*told, g.Closed(self._closed)]

    def _close_full_groups(self) -> list[g.Command]:
        self._roll()
        full = [n for n, group in self._groups.items() if n != self._present and group.version == self._version]
        if self._adding is not None and any(self._adding in self._groups[n].members for n in full):
            return []
        self._closing, self._closed = None, tuple(full)
        return [g.Closed(self._closed), *self._add_next()]

    # Members.

    def _checked(self, nonce: bytes, reason: str, detail: str) -> list[g.Command]:
        if self._states.get(nonce) not in (Member.JOINED, Member.OFFERED):
            return []  # it was released while it was checked
        if reason:
            self._forget(nonce)
            told: list[g.Command] = [g.Tell(nonce, "refused", reason=reason, detail=detail), g.ReleaseMember(nonce)]
            return told + self._finish_closing()
        assert self._states[nonce] is Member.OFFERED, "only what is whole is found good"
        self._states[nonce] = Member.CHECKED
        self._queue.append(nonce)
        return self._add_next()

    def _add_next(self) -> list[g.Command]:
        """The oldest in the queue whose version's sum has room."""
        if self._adding is not None or not self._is_open or (self._is_ending and self._closing is None):
            return []
        for nonce in self._queue:
            staleness = self._version - self._versions[nonce]
            version = self._sum_of(self._versions[nonce])
            if self._room.setdefault(version, self._most) <= 0:
                continue
            self._roll()
            self._queue.remove(nonce)
            self._room[version] -= 1
            self._adding, self._states[nonce] = nonce, Member.ADDING
            group = self._present if version == self._version else self._late_group(version)
            self._groups[group].members.append(nonce)
            return [g.Add(nonce, group, self._policy.discount(staleness))]
        return []

    def _roll(self) -> None:
        """A new present group where the last is full, unless what is left to the goal could not be a group of its own."""
        added = self._most - self._room[self._version]
        left = self._policy.commit_at - added
        is_full = 0 < self._policy.group_size <= len(self._groups[self._present].members)
        if is_full and left >= self._policy.minimum_group:
            self._present = self._new_group(self._version)

    def _late_group(self, version: int) -> int:
        late = [n for n, group in self._groups.items() if group.version == version and n != self._present]
        return late[0] if late else self._new_group(version)

    def _was_added(self, nonce: bytes) -> list[g.Command]:
        staleness = self._version - self._versions.pop(nonce)
        self._states[nonce], self._adding = Member.ADDED, None
        counted: list[g.Command] = [g.CountMember(nonce, staleness)]
        return counted + (self._finish_closing() if self._closing is not None else self._add_next())

    def _dissolve(self) -> list[g.Command]:
        group = self._groups[self._present]
        is_busy = self._closing is not None or self._closed or self._adding is not None or self._queue
        if is_busy or len(group.members) >= self._policy.minimum_group:
            return []
        commands: list[g.Command] = [g.Drop(self._present)] if group.members else []
        self._room[self._version] += len(group.members)
        for nonce in [*group.members, *self._versions]:
            self._states.pop(nonce)
            self._versions.pop(nonce, None)
            commands += [g.Tell(nonce, "moved"), g.ReleaseMember(nonce)]
        group.members.clear()
        return commands

    def _forget(self, nonce: bytes) -> None:
        super()._forget(nonce)
        if nonce in self._queue:
            self._queue.remove(nonce)
