"""A whole secure group in one process: members and server, their messages serialized, some members lost on the way.

For simulation, tests and benchmarks. Each member is asked in turn; who is to be lost in a phase gives no answer there.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import ProtocolError, RoundError
from shoal.privacy import masks
from shoal.privacy import secure_server as server
from shoal.privacy.identity import Identity, Trusted
from shoal.privacy.secure_member import SecureMember
from shoal.privacy.secure_terms import GROUP_BYTES, Terms
from shoal.privacy.wire import secure_pb2 as pb

PHASES = ("shares", "masked", "signed", "unmask", "added")
"""In which a member may be lost, by not answering; added: once its vector is in the sum."""


@dataclass
class Played:
    """What came of a group."""

    total: np.ndarray
    """(size,) uint32: the sum of the survivors' values, each element modulo its segment's 2^bits."""
    survivors: tuple[int, ...]
    """By place in what was given."""
    server_s: float
    """Processor time of the server: messages, adding up, opening."""
    opening_s: float
    """Of that, taking the masks off."""
    member_s: float
    """Processor time of a member that stays to the end; the largest."""
    up_bytes: int
    """That such a member sends; the largest."""
    down_bytes: int
    num_masks: int
    """That the server took off."""
    spent: set[int] = field(default_factory=set)
    """Members that revealed shares."""


def play(
    terms: Terms,
    values: Callable[[int], np.ndarray],
    members: int,
    *,
    random: Callable[[int], bytes],
    lost: Mapping[int, str] | None = None,
    identities: Sequence[Identity] | None = None,
    trusted: Trusted | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Played:
    """Plays a group.

    Args:
        terms: of the group.
        values: of a member, by its place: (size,) uint32.
        members: how many.
        random: so many unpredictable bytes.
        lost: place -> the phase that it does not answer in.
        identities: of the members, where they are certified; made here else.
        trusted: the authority.
        clock: seconds, for what is told of costs.

    Raises:
        RoundError: no sum came of it; the message says why.
    """
    lost = lost or {}
    group = random(GROUP_BYTES)
    who = identities or [Identity.of_seed(random(32)) for _ in range(members)]
    machine = server.SecureServer(terms, group, trusted=trusted)
    actors = [SecureMember(terms, group, each, trusted=trusted, random=random, wall_s=0.0) for each in who]
    total, survivors = np.zeros(terms.size, np.uint32), pb.Survivors()
    spent_s, up, down, server_s = (
        defaultdict[int, float](float),
        defaultdict[int, int](int),
        defaultdict[int, int](int),
        0.0,
    )
    gone: set[int] = set()
    found: server.Open | None = None
    queue: list[server.Command] = []

    def tell(event: server.Event) -> None:
        nonlocal server_s
        begun = clock()
        queue.extend(machine.step(event, 0.0))
        server_s += clock() - begun

    def answer(place: int, message: object) -> None:
        nonlocal survivors, server_s
        begun, name, actor = clock(), place.to_bytes(4, "big"), actors[place]
        made: pb.Shares | pb.Signed | pb.Unmask | bytes
        match message:
            case pb.Roster():
                made = actor.shares(message)
            case pb.Shares():
                made = actor.masked(message, values(place))
            case pb.Survivors():
                survivors = message
                made = actor.sign(message) if terms.certified else actor.unmask(message)
            case pb.Agreement():
                made = actor.unmask(survivors, message)
            case _:
                raise AssertionError(message)
        spent_s[place] += clock() - begun
        data = made if isinstance(made, bytes) else made.SerializeToString()
        up[place] += len(data)
        if isinstance(made, bytes):
            begun = clock()
            np.add(total, terms.unpack(made), out=total)
            server_s += clock() - begun
            tell(server.Added(name))
            if lost.get(place) == "added":
                gone.add(place)
                tell(server.Gone(name))
        elif isinstance(made, pb.Shares):
            tell(server.Shared(name, pb.Shares.FromString(data)))
        elif isinstance(made, pb.Signed):
            tell(server.Signed(name, pb.Signed.FromString(data)))
        else:
            tell(server.Unmasked(name, pb.Unmask.FromString(data)))

    for place, actor in enumerate(actors):
        begun = clock()
        advert = actor.advert()
        spent_s[place] += clock() - begun
        up[place] += advert.ByteSize()
        tell(server.Advertised(place.to_bytes(4, "big"), advert))
    tell(server.Full())
    while queue:
        command = queue.pop(0)
        match command:
            case server.Send(name, message):
                place = int.from_bytes(name, "big")
                down[place] += message.ByteSize()
                if place in gone:
                    continue
                if lost.get(place) == machine.phase:
                    tell(server.Gone(name))
                    continue
                try:
                    answer(place, type(message).FromString(message.SerializeToString()))
                except ProtocolError:
                    tell(server.Gone(name))
            case server.Open():
                found = command
            case server.Failed(why):
                raise RoundError(f"The group failed: {why}.")
            case server.Lost():
                pass
    assert found is not None, "a group is opened or fails"
    begun = clock()
    taken_off = found.opening.masks()
    masks.add_masks(total, taken_off)
    terms.reduced(total)
    opening_s = clock() - begun
    stayed = [place for place in range(members) if place not in lost]
    return Played(
        total=total,
        survivors=tuple(sorted(int.from_bytes(name, "big") for name in found.survivors)),
        server_s=server_s + opening_s,
        opening_s=opening_s,
        member_s=max(spent_s[place] for place in stayed),
        up_bytes=max(up[place] for place in stayed),
        down_bytes=max(down[place] for place in stayed),
        num_masks=len(taken_off),
        spent={place for place, actor in enumerate(actors) if actor.is_spent},
    )
