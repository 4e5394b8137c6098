"""What is seen of a fleet: counters and histograms, never a device. A machine without I/O, one at each Edge.

A *session* is one assignment, from check-in to its end, whatever streams break in between. Its *shape* is the way it went,
a character a state (after Bonawitz et al. 2019, "Towards federated learning at scale", on analytics)::

    -  checked in, and was taken         ^  its update is in a sum that was closed
    v  got plan and model                #  its update was refused
    [  began to train                    x  was told to stop: the round had what it needed
    ]  has trained                       !  was lost, or came back with nothing
    +  began to send its update          *  gave up

`-v[]+^` is the way it should go. An Edge sees messages, not training: that a device got the model, or trained, is known from
what it does next. So one that is lost before it sends anything has the shape `-v!`.

What few had could betray one: `Folding` writes no shape and no kind of error that fewer than a minimum of devices had in a
round (what a device has again in a round is `other` from the start). They are counted as `other`, and where these are few, too,
nothing is said of when and where; when those of several rounds together reach the minimum they get their name back, in the
total of the run alone. (What is kept back is forgotten when the host ends: it stays `other`.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import log2
from typing import Any, Final, Self

WAY: Final = "-v[]+"
"""The states of a session in their order; one of `ENDS` follows."""
ENDS: Final = "^#x!*"
OTHER: Final = "other"
SMALLEST_S: Final = 1e-3
MAX_KINDS: Final = 64
"""Kinds of error that are told apart."""
GIVES_UP_IN: Final = {"fetching": "-", "queued": "-v", "training": "-v[", "reporting": "-v[]"}
"""What a device that gives up says it was doing -> how far it had come."""

Bins = dict[int, int]
"""Times, counted in bins: number -> times from 1 ms x 2^(number / 2) up to the next bin; those below are in bin 0."""


def bin_of(seconds: float) -> int:
    """The bin of a time."""
    return max(0, int(2.0 * log2(seconds / SMALLEST_S))) if seconds > SMALLEST_S else 0


def quantile(bins: Bins, share: float) -> float:
    """The time, in seconds, that this share of the times is below; within a bin the logarithm is taken to be even.

    Raises:
        ValueError: there are no times.
    """
    total = sum(bins.values())
    if not total:
        raise ValueError("Expected times to take a quantile of, got none.")
    left = share * total
    number = 0
    for number, count in sorted(bins.items()):
        if count >= left:
            return float(SMALLEST_S * 2.0 ** ((number + left / count) / 2.0))
        left -= count
    return float(SMALLEST_S * 2.0 ** ((number + 1) / 2.0))


@dataclass(slots=True)
class Errors:
    """Errors of one kind."""

    count: int = 0
    first_s: float | None = 0.0
    """Of the first, in seconds since the round began; None: not told."""
    edge: str = ""
    """Where the first was, as the Coordinator calls it; empty at the host's own Edge."""

    def merge(self, other: "Errors") -> None:
        """Adds others, which happened in the same round."""
        if other.count and (not self.count or _is_before(other.first_s, self.first_s)):
            self.first_s, self.edge = other.first_s, other.edge
        self.count += other.count


@dataclass(slots=True)
class Seen:
    """What was seen over some time, at one Edge or several."""

    counts: dict[str, int] = field(default_factory=dict)
    """check_ins | told_later | selected | counted, of these discounted | patched; refused | refused_late | released | lost |
    gave_up."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Sessions that ended, by shape."""
    errors: dict[str, Errors] = field(default_factory=dict)
    """By kind."""
    times: dict[str, Bins] = field(default_factory=dict)
    """wait (from check-in to assignment) | train (until the first byte of the update, what the device fetched included) |
    upload | group (from a whole update to the close of its sum)."""

    def merge(self, other: "Seen") -> None:
        """Adds what was seen elsewhere."""
        for mine, theirs in ((self.counts, other.counts), (self.shapes, other.shapes)):
            _add(mine, theirs)
        for phase, bins in other.times.items():
            _add(self.times.setdefault(phase, {}), bins)
        for kind, errors in other.errors.items():
            self.errors.setdefault(kind, Errors()).merge(errors)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts, "shapes": self.shapes,
            "errors": {
                kind: {"count": e.count, "first_s": None if e.first_s is None else round(e.first_s, 3), "edge": e.edge}
                for kind, e in self.errors.items()
            },
            "times": {phase: {str(number): count for number, count in bins.items()} for phase, bins in self.times.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` would not have written."""
        return cls(
            counts={str(name): int(count) for name, count in data["counts"].items()},
            shapes={str(shape): int(count) for shape, count in data["shapes"].items()},
            errors={
                str(kind): Errors(
                    int(e["count"]), None if e["first_s"] is None else float(e["first_s"]), str(e["edge"])
                )
                for kind, e in data["errors"].items()
            },
            times={
                str(phase): {int(number): int(count) for number, count in bins.items()}
                for phase, bins in data["times"].items()
            },
        )


@dataclass(slots=True)
class _Session:
    """One that is open."""

    way: int = 2
    """States of `WAY` that it has been through."""
    assigned_s: float | None = None
    sending_s: float | None = None
    whole_s: float | None = None
    is_away: bool = False


class Analytics:
    """See the module's text. It holds something of sessions that are open, and of nobody else."""

    def __init__(self) -> None:
        self._seen = Seen()
        self._open: dict[bytes, _Session] = {}
        self._had: dict[bytes, set[str]] = {}
        """Nonce -> shapes and errors that it had since `take`."""
        self._round_began_s = 0.0

    @property
    def num_open(self) -> int:
        """Sessions that have not ended."""
        return len(self._open)

    def take(self) -> Seen:
        """What was seen since this was asked last."""
        seen, self._seen = self._seen, Seen()
        self._had.clear()
        return seen

    def round_began(self, now_s: float) -> None:
        """Times of errors are from here on."""
        self._round_began_s = now_s
        for errors in self._seen.errors.values():
            errors.first_s = 0.0  # between two rounds

    def count(self, what: str, number: int = 1) -> None:
        """Something that has a number and nothing else."""
        self._seen.counts[what] = self._seen.counts.get(what, 0) + number

    def error(self, kind: str, now_s: float, *, nonce: bytes = b"") -> None:
        """Something failed. `kind` is never a device's own text; `nonce`: whose session it is, where it has one."""
        kind = self._once(nonce, kind) if nonce else kind
        if kind not in self._seen.errors and len(self._seen.errors) >= MAX_KINDS:
            kind = OTHER
        one = Errors(1, max(0.0, now_s - self._round_began_s))
        self._seen.errors.setdefault(kind, Errors()).merge(one)

    # A session's way.

    def joined(self, nonce: bytes) -> None:
        """A member of the round: one that is being assigned, or that comes with a token from before."""
        self.count("selected")
        self._open.setdefault(nonce, _Session())

    def assigned(self, nonce: bytes, now_s: float, *, waited_s: float) -> None:
        """It was sent its assignment, so many seconds after it had checked in."""
        session = self._open.get(nonce)
        if session is not None and session.assigned_s is None:
            session.assigned_s = now_s
            self._time("wait", waited_s)

    def training(self, nonce: bytes) -> None:
        """It is known to train."""
        if (session := self._open.get(nonce)) is not None:
            session.way = max(session.way, 3)

    def sending(self, nonce: bytes, now_s: float) -> None:
        """A piece of its update has come, or all of it."""
        session = self._open.get(nonce)
        if session is None:
            return
        session.is_away = False
        if session.sending_s is None:
            session.way, session.sending_s = len(WAY), now_s
            if session.assigned_s is not None:
                self._time("train", now_s - session.assigned_s)

    def whole(self, nonce: bytes, now_s: float) -> None:
        """Its update is here."""
        self.sending(nonce, now_s)
        session = self._open.get(nonce)
        if session is not None and session.sending_s is not None and session.whole_s is None:
            session.whole_s = now_s
            self._time("upload", now_s - session.sending_s)

    def away(self, nonce: bytes, now_s: float) -> None:
        """Its stream broke; it may come back."""
        if (session := self._open.get(nonce)) is not None and not session.is_away:
            session.is_away = True
            self.error("stream broke", now_s, nonce=nonce)

    # Its end.

    def closed(self, nonces: Iterable[bytes], now_s: float) -> None:
        """The sum that they are in is closed."""
        for nonce in nonces:
            session = self._end(nonce, "^")
            if session is not None and session.whole_s is not None:
                self._time("group", now_s - session.whole_s)

    def told(self, nonce: bytes, outcome: str, reason: str, now_s: float) -> None:
        """How its update ended, as the device is told: counted (which `closed` knew before) | refused | released | moved."""
        if outcome == "refused":
            self._end(nonce, "#")
            if reason == "late":
                self.count("refused_late")
            else:
                self.count("refused")
                self.error("commit failed" if reason == "failed" else f"refused: {reason}", now_s, nonce=nonce)
        elif outcome == "moved":
            self.moved(nonce)
        elif outcome == "released" and (session := self._open.get(nonce)) is not None:
            self.count("lost" if session.is_away else "released")
            self._end(nonce, "!" if session.is_away else "x")

    def gave_up(self, nonce: bytes, stage: str, now_s: float) -> None:
        """The device says that it cannot; `stage` is what it says it was doing."""
        session = self._open.get(nonce)
        if session is None:
            return
        session.way = max(len(GIVES_UP_IN.get(stage, "-v")), session.way if session.sending_s is not None else 0)
        self.count("gave_up")
        self.error(f"gave up {stage if stage in GIVES_UP_IN else OTHER}", now_s, nonce=nonce)
        self._end(nonce, "*")

    def moved(self, nonce: bytes) -> None:
        """It goes on at another Edge."""
        self._open.pop(nonce, None)

    def gone(self, nonce: bytes) -> None:
        """It is no member any more; if nothing was said of its end before, it came back with nothing."""
        if nonce in self._open:
            self.count("lost")
            self._end(nonce, "!")

    def _end(self, nonce: bytes, end: str) -> _Session | None:
        session = self._open.pop(nonce, None)
        if session is not None:
            shape = self._once(nonce, WAY[: session.way] + end)
            self._seen.shapes[shape] = self._seen.shapes.get(shape, 0) + 1
        return session

    def _once(self, nonce: bytes, name: str) -> str:
        """What is counted by its name once for a device in a round, so that one device alone is never many."""
        had = self._had.setdefault(nonce, set())
        if name in had:
            return OTHER
        had.add(name)
        return name

    def _time(self, phase: str, seconds: float) -> None:
        bins, number = self._seen.times.setdefault(phase, {}), bin_of(seconds)
        bins[number] = bins.get(number, 0) + 1


class Folding:
    """Makes of what was seen in a round what may be written of it. See the module's text."""

    def __init__(self, minimum: int) -> None:
        """`minimum`: devices that must have had something before it is named."""
        self._minimum = minimum
        self._shapes: dict[str, int] = {}
        self._errors: dict[str, int] = {}
        self._times: dict[str, Bins] = {}

    def fold(self, seen: Seen) -> dict[str, Any]:
        """A round's analytics: those of `Seen.to_json`, and under `named` what earlier rounds had as `other`.

        A histogram waits until it holds enough times.
        """
        few = {kind: errors for kind, errors in seen.errors.items() if errors.count < self._minimum}
        errors = {kind: errors for kind, errors in seen.errors.items() if kind not in few}
        for each in few.values():
            errors.setdefault(OTHER, Errors()).merge(each)
        if OTHER in errors and errors[OTHER].count < self._minimum:
            errors[OTHER] = Errors(errors[OTHER].count, None)
        shapes = {shape: count for shape, count in seen.shapes.items() if count >= self._minimum}
        if folded := sum(seen.shapes.values()) - sum(shapes.values()):
            shapes[OTHER] = shapes.get(OTHER, 0) + folded
        for phase, bins in seen.times.items():
            _add(self._times.setdefault(phase, {}), bins)
        times = {phase: bins for phase, bins in self._times.items() if sum(bins.values()) >= self._minimum}
        self._times = {phase: bins for phase, bins in self._times.items() if phase not in times}
        named = {
            "shapes": self._named(self._shapes, seen.shapes),
            "errors": self._named(self._errors, {kind: each.count for kind, each in few.items()}),
        }
        told = Seen(dict(seen.counts), shapes, errors, times).to_json()
        return told | ({"named": named} if any(named.values()) else {})

    def _named(self, kept: dict[str, int], counts: Mapping[str, int]) -> dict[str, int]:
        _add(kept, {name: count for name, count in counts.items() if count < self._minimum and name != OTHER})
        enough = {name: count for name, count in kept.items() if count >= self._minimum}
        for name in enough:
            del kept[name]
        return enough


def total(rounds: Iterable[Mapping[str, Any]]) -> Seen:
    """The sum over the analytics of rounds; one without any (an older record's) adds nothing.

    What errors have beside their number is a round's, and means nothing here.
    """
    seen = Seen()
    for data in rounds:
        if "counts" not in data:
            continue
        seen.merge(Seen.from_json(data))
        named = data.get("named", {"shapes": {}, "errors": {}})
        _add(seen.shapes, {**named["shapes"], OTHER: -sum(named["shapes"].values())})
        for kind, count in {**named["errors"], OTHER: -sum(named["errors"].values())}.items():
            seen.errors.setdefault(kind, Errors()).count += count
    seen.shapes = {shape: count for shape, count in seen.shapes.items() if count > 0}
    seen.errors = {kind: errors for kind, errors in seen.errors.items() if errors.count > 0}
    return seen


def _is_before(mine: float | None, theirs: float | None) -> bool:
    return mine is not None and (theirs is None or bool(mine < theirs))


def _add(counts: dict[Any, int], more: Mapping[Any, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count
