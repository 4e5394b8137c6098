"""What a round's machine was told, in a form that it can be run again from: to see what happened, and that it is right.

`RoundRecorder` stands before the machine: it notes each event, when it came and what the machine said to it. `replay` runs
a machine from that, and holds each of its commands against what was noted.

The log of a round begins with the event that opened it (the start of the run, or the end of the round before) and ends with
the one that closed it. It names no device: those of a round are numbered as they appear, anew in every round, and a
device's nonce has its number; who rests is noted instead of the versions that it was in. It does hold times and the order of arrivals, and the generator's state: what a reader of
the record could conclude from them stands in `docs/trust.md`.

Form: zlib of canonical JSON, `{"format": "shoal-round-log/1", policy, last_version, state, rng, steps, left_out}`; a step is
[seconds on the host's clock, event, commands]; an event or command is [its class, its fields in their order].
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from shoal.errors import InvalidTransition, StoreError
from shoal.fleet import round_events as r
from shoal.fleet.round import RoundMachine
from shoal.fleet.windows import ReportTimes
from shoal.policy import RoundPolicy

FORMAT: Final = "shoal-round-log/1"
MOST_EVENTS: Final = 20_000
"""Events of a round that are noted, each device of an arrival counted; what comes after is left out."""
MAX_BYTES: Final = 64 << 20
"""Of a log, unpacked."""
_CLASSES: Final = {
    cls.__name__: cls
    for cls in (
        r.Started, r.Arrived, r.Left, r.Joined, r.Counted, r.Released, r.Away, r.Stored, r.Committed, r.Failed,
        r.Abandoned, r.Tick, r.Stop,
        r.OpenRound, r.Assign, r.StoreGroup, r.Gather, r.CommitRound, r.AbandonRound, r.Finish, r.WakeAt,
    )
}  # fmt: skip
_FIELDS: Final = {cls: tuple(f.name for f in fields(cls)) for cls in _CLASSES.values()}
_OPENERS: Final = (r.Started, r.Committed, r.Abandoned)
_NONCES: Final = frozenset({"_outstanding", "_counted", "_safe", "_gave_way"})
_BY_NONCE: Final = frozenset({"_behind", "_assigned_s", "_open", "_edge_of"})
_BY_DEVICE: Final = frozenset({"_waiting", "_rests"})
_PLAIN: Final = (bool, int, float, str, type(None))


class RoundRecorder:
    """See the module's text."""

    def __init__(self, machine: RoundMachine, *, is_on: bool = True, most_events: int = MOST_EVENTS) -> None:
        self._machine, self._is_on, self._most = machine, is_on, most_events
        self._saved: dict[str, Any] | None = None
        self._nonces: dict[str, bytes] = {}
        self._steps: list[tuple[float, r.Event, list[r.Command]]] = []
        self._size = self._left_out = 0

    def step(self, event: r.Event, now_s: float) -> list[r.Command]:
        """Steps the machine."""
        if not self._is_on:
            return self._machine.step(event, now_s)
        if isinstance(event, _OPENERS):
            self._saved, self._steps, self._size, self._left_out = self._machine.saved(), [], 0, 0
            self._nonces = {}
        elif isinstance(event, r.Failed):
            self._nonces = self._machine.nonces()  # the machine forgets them with its members
        commands = self._machine.step(event, now_s)
        self._size += len(event.devices) if isinstance(event, r.Arrived) else 1
        if self._size <= self._most:
            self._steps.append((now_s, event, commands))
        else:
            self._left_out += 1
        return commands

    def data(self) -> bytes:
        """The log of the round that is being closed; nothing steps the machine meanwhile."""
        assert self._saved is not None, "a round has begun"
        present = self._nonces | self._machine.nonces()
        names = _Names(present)
        saved = self._machine.saved()
        # Whether, not until when: that would say in which version somebody was.
        rests = {
            device: min(free, saved["_version"] + 1) for device, free in saved["_rests"].items() if device in present
        }
        state = _state_to_json({**self._saved, "_rests": rests, "_recent": {}}, names)
        policy = self._machine.policy.to_json()
        policy["selection"] = {**policy["selection"], "ids": names.some_devices(policy["selection"]["ids"])}
        steps = [
            [at_s, _to_json(event, names), [_to_json(command, names) for command in commands]]
            for at_s, event, commands in self._steps
        ]
        log = {"format": FORMAT, "policy": policy, "state": state, "steps": steps, "left_out": self._left_out}
        return zlib.compress(json.dumps(log, sort_keys=True, separators=(",", ":")).encode(), 1)


class _Names:
    """Numbers in place of devices and nonces; a device and its nonce of the present version have the same."""

    def __init__(self, nonces: Mapping[str, bytes]) -> None:
        self._nonce_of = nonces
        self._devices: dict[str, int] = {}
        self._nonces: dict[bytes, int] = {}
        self._count = 0

    def device(self, device: str) -> int:
        number = self._devices.get(device)
        if number is None:
            nonce = self._nonce_of.get(device)
            number = self._new() if nonce is None else self.nonce(nonce)
            self._devices[device] = number
        return number

    def nonce(self, nonce: bytes) -> int:
        number = self._nonces.get(nonce)
        if number is None:
            number = self._nonces[nonce] = self._new()
        return number

    def some_devices(self, devices: Iterable[str]) -> list[int]:
        return [self.device(device) for device in devices]

    def some_nonces(self, nonces: Iterable[bytes]) -> list[int]:
        return sorted(map(self.nonce, nonces))

    def _new(self) -> int:
        self._count += 1
        return self._count


def _nonce(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _to_json(said: r.Event | r.Command, names: _Names) -> list[Any]:
    made: list[Any] = [type(said).__name__]
    for name in _FIELDS[type(said)]:
        value = getattr(said, name)
        made.append(value if value is None or name not in _TO_JSON else _TO_JSON[name](names, value))
    return made


def _from_json(said: list[Any]) -> Any:
    cls = _CLASSES[said[0]]
    told = zip(_FIELDS[cls], said[1:], strict=cls is not r.Started)  # older logs' say nothing of who rests
    return cls(**{n: v if v is None or n not in _FROM_JSON else _FROM_JSON[n](v) for n, v in told})


_TO_JSON: Final[Mapping[str, Callable[[_Names, Any], Any]]] = {
    "device": _Names.device, "devices": _Names.some_devices, "nonce": _Names.nonce,
    **dict.fromkeys(("nonces", "counted", "closed"), _Names.some_nonces),
    "recent": lambda names, value: {},
}  # fmt: skip
"""Fields of events and commands that name somebody; the others are plain."""
_FROM_JSON: Final[Mapping[str, Callable[[Any], Any]]] = {
    "device": str, "devices": lambda numbers: tuple(map(str, numbers)), "nonce": _nonce,
    **dict.fromkeys(("nonces", "counted", "closed"), lambda numbers: frozenset(map(_nonce, numbers))),
}  # fmt: skip


def _state_to_json(saved: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "_nonces":
            made[name] = names.some_devices(value)
        elif name in _BY_DEVICE:
            made[name] = [[names.device(device), of] for device, of in value.items()]
        elif name == "_recent":
            made[name] = {}
        elif name == "_edges":
            made[name] = list(value)
        elif name in _NONCES:
            made[name] = names.some_nonces(value)
        elif name in _BY_NONCE:
            made[name] = [[names.nonce(nonce), of] for nonce, of in value.items()]
        elif isinstance(value, r.Phase):
            made[name] = value.value
        elif isinstance(value, ReportTimes):
            made[name] = value.to_json()
        else:
            made[name] = value if name == "rng" else _plain(name, value)
    return made


def _plain(name: str, value: Any) -> Any:
    if not isinstance(value, _PLAIN):
        raise TypeError(
            f"Expected {name} to be text, a number or None, got {type(value).__name__}: a log cannot hold it."
        )
    return value


def _state_from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(state)
    made |= {name: {str(number): of for number, of in state.get(name, ())} for name in _BY_DEVICE}
    made["_recent"] = {}
    made["_edges"] = dict.fromkeys(state["_edges"])
    made["_nonces"] = {str(number): _nonce(number) for number in state["_nonces"]}
    made |= {name: set(map(_nonce, state[name])) for name in _NONCES}
    made |= {name: {_nonce(number): of for number, of in state[name]} for name in _BY_NONCE}
    made["_phase"] = r.Phase(state["_phase"])
    made["_times"] = ReportTimes.from_json(state["_times"])
    return made


@dataclass(frozen=True)
class Step:
    """An event of a round that was run again. Devices and nonces are numbers."""

    time_s: float
    """Seconds since the round was opened."""
    phase: r.Phase
    """In which it came."""
    event: r.Event
    commands: tuple[r.Command, ...]
    """What the machine said to it, then and now."""


@dataclass(frozen=True)
class Replay:
    """A round that was run again, and said what it had said."""

    began_s: float
    """On the host's clock, which `WakeAt` is in."""
    steps: tuple[Step, ...]
    left_out: int
    """Events at its end that the log does not hold."""
    end: r.Snapshot
    """The machine after the last step."""

    @property
    def close(self) -> r.CommitRound | r.AbandonRound | None:
        """How the round was closed; None where the log does not hold it."""
        closes = [c for step in self.steps for c in step.commands if isinstance(c, r.CommitRound | r.AbandonRound)]
        return closes[-1] if closes else None


def replay(data: bytes) -> Replay:
    """Runs a round again.

    Args:
        data: a log of `RoundRecorder`.

    Raises:
        StoreError: the bytes are no log, or the machine does not say now what it said then.
    """
    try:
        log = _unpacked(data)
        machine = _machine(log)
        told = [
            (float(at_s), _from_json(event), [_from_json(c) for c in commands])
            for at_s, event, commands in log["steps"]
        ]
        left_out = int(log["left_out"])
        if not told:
            raise ValueError("it holds no event")
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise StoreError(f"The round's log is damaged, or of another version of shoal: {error}.") from error
    steps = []
    for number, (at_s, event, commands) in enumerate(told):
        phase = machine.snapshot().phase
        try:
            said = machine.step(event, at_s)
        except (InvalidTransition, AssertionError) as error:
            raise StoreError(f"At step {number + 1} the round's machine refuses {event}: {error}") from error
        if said != commands:
            raise StoreError(
                f"At step {number + 1}, {event}, the round's machine said {commands}; run again it says {said}. Its rules "
                "have changed since, or the log was altered."
            )
        steps.append(Step(at_s - told[0][0], phase, event, tuple(said)))
    return Replay(told[0][0], tuple(steps), left_out, machine.snapshot())


def _unpacked(data: bytes) -> dict[str, Any]:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError("it does not end")
    log = json.loads(text)
    if not isinstance(log, dict) or log.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}")
    return log


def _machine(log: Mapping[str, Any]) -> RoundMachine:
    policy = dict(log["policy"])
    policy["selection"] = {**policy["selection"], "ids": list(map(str, policy["selection"]["ids"]))}
    saved = _state_from_json(log["state"])
    generator = getattr(np.random, str(saved["rng"]["bit_generator"]), None)
    if not (isinstance(generator, type) and issubclass(generator, np.random.BitGenerator)):
        raise ValueError(f"there is no generator {saved['rng']['bit_generator']}")
    return RoundMachine.restored(
        RoundPolicy.from_json(policy),
        saved,
        nonce_of=lambda version, device: _nonce(int(device)),
        rng=np.random.Generator(generator()),
    )
