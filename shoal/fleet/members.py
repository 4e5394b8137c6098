"""Who is a member, where a host serves members only: invitations that were made, and devices that have come by one.

A device shows a token of an invitation and a secret of its own. The first time under its name the token makes it a member, which
takes one of the invitation's uses; from then on the secret is what counts, whether the invitation has ended or not. Files, in
`RUN/members/`: `invitations/HASH.json` and `removed/HASH`, written by `shoal invite`, and `members.jsonl`, to which the host alone adds.
They hold SHA-256 of tokens, secrets and names only: who reads them can become nobody.

Guarantees:
    * An invitation makes at most as many members as it has uses, and none once it has ended.
    * A member's name serves nobody who has another secret, and nobody at all once the member was removed.
    * Who was told to come in is a member after a crash, too: the line is on the disk first.
"""

import hashlib
import hmac
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from shoal.clock import Clock, SystemClock
from shoal.errors import DataError, StoreError
from shoal.fleet.append import append_for_good
from shoal.fleet.device_secret import CREDENTIAL, SECRET_BYTES
from shoal.fleet.invitation import TOKEN_BYTES
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.tensors import sha256

FOLDER: Final = "members"
MOST_USES: Final = 1_000_000
_MEMBERS: Final = "members.jsonl"
_INVITATIONS: Final = "invitations"
_REMOVED: Final = "removed"
_MOST_BYTES: Final = 4_096


@dataclass(frozen=True)
class _Invited:
    population: str
    expires_s: int
    uses: int


@dataclass(frozen=True)
class _Member:
    secret: str
    """SHA-256 of it."""
    invitation: str


class Members:
    """See the module's text. One host process has one."""

    def __init__(self, run_folder: Path, clock: Clock | None = None) -> None:
        """Raises StoreError where the members cannot be read."""
        self._clock = clock or SystemClock()
        self._folder = run_folder / FOLDER
        self._members: dict[str, _Member] = {}
        self._used: Counter[str] = Counter()
        self._load()

    @classmethod
    def of(cls, run_folder: Path) -> Self | None:
        """Those of a run that serves members only; None: of one that serves whoever comes."""
        return cls(run_folder) if (run_folder / FOLDER).is_dir() else None

    @classmethod
    def begin(cls, run_folder: Path) -> Self:
        """From now on the run serves members only."""
        (run_folder / FOLDER / _INVITATIONS).mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(run_folder)

    def __len__(self) -> int:
        return len(self._members)

    async def admit(self, check_in: pb.CheckIn) -> str:
        """As `Entrance.admit`: `refusal`, now."""
        return self.refusal(check_in, self._clock.wall_s())

    def refusal(self, check_in: pb.CheckIn, wall_s: float) -> str:
        """What the device lacks to be served, in words; "" for a member, which it may be from now on.

        Raises:
            StoreError: that it is one cannot be written down; it may try again.
        """
        shown, population = check_in.credential, check_in.population or "default"
        size = len(CREDENTIAL) + TOKEN_BYTES + SECRET_BYTES
        if len(shown) != size or not shown.startswith(CREDENTIAL):
            return "an invitation, as this host serves members only: shoal device --join LINE, with a line of `shoal invite`"
        token, secret = shown[1 : 1 + TOKEN_BYTES], sha256(shown[1 + TOKEN_BYTES :])
        name = _name(population, check_in.device_id)
        known = self._members.get(name)
        if (self._folder / _REMOVED / name).exists():
            return "another --id, and an invitation: the member of this name was removed"
        if known is not None and hmac.compare_digest(known.secret, secret):
            return ""
        if why := self._not_invited(sha256(token), population, wall_s):
            return why
        if known is not None:
            return (
                "another --id, or the --state folder that it had before: a device of this name is a member already, with a secret "
                "of its own"
            )
        self._add(name, _Member(secret, sha256(token)), wall_s)
        return ""

    def _not_invited(self, invitation: str, population: str, wall_s: float) -> str:
        invited = _invited(self._folder / _INVITATIONS / f"{invitation}.json")
        if invited is None or invited.population != population:
            return "an invitation to this host and population, which the one it shows is not: shoal invite makes them"
        if self._used[invitation] >= invited.uses:
            return f"an invitation with a use left: this one was for {invited.uses} and has made so many members"
        if wall_s >= invited.expires_s:
            return "an invitation that has not ended, as this one has"
        return ""

    def _add(self, name: str, member: _Member, wall_s: float) -> None:
        line = {"member": name, "secret": member.secret, "invitation": member.invitation, "since_s": int(wall_s)}
        try:
            append_for_good(self._folder / _MEMBERS, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise StoreError(f"A new member cannot be written down: {error.strerror}.") from error
        self._know(name, member)

    def _know(self, name: str, member: _Member) -> None:
        self._members[name] = member
        self._used[member.invitation] += 1

    def _load(self) -> None:
        path = self._folder / _MEMBERS
        if not path.exists():
            return
        data = path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # the host died as it wrote it, and has told nobody yet
            os.truncate(path, len(data) - len(torn))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                said = json.loads(line)
                name, member = str(said["member"]), _Member(str(said["secret"]), str(said["invitation"]))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"Line {number} of {path} is not a member: take the file from a backup.") from error
            if name not in self._members:
                self._know(name, member)


def invite(run_folder: Path, token: bytes, *, population: str, expires_s: int, uses: int) -> None:
    """Makes a token good for so many members until a time; the host need not be told.

    Args:
        run_folder: of a run that serves members only.
        token: 16 random bytes.
        population: of which who shows it becomes a member.
        expires_s: seconds since the epoch.
        uses: members that it may make.

    Raises:
        ValueError: `uses` is out of range.
    """
    if not 1 <= uses <= MOST_USES:
        raise ValueError(f"Expected 1 to {MOST_USES:,} uses, got {uses}.")
    folder = run_folder / FOLDER / _INVITATIONS
    path = folder / f"{sha256(token)}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"population": population, "expires_s": expires_s, "uses": uses}) + "\n")
    partial.replace(path)


def remove(run_folder: Path, device: str, *, population: str) -> None:
    """The device is no member any more, from its next check-in or the host's next look on, which is minutes away at most; its name serves nobody.

    Raises:
        DataError: no member has that name.
    """
    folder, name = run_folder / FOLDER, _name(population, device)
    try:
        is_known = f'"{name}"' in (folder / _MEMBERS).read_text()
    except FileNotFoundError:
        is_known = False
    if not is_known:
        raise DataError(f"No member of population {population!r} is called {device!r}: nothing was changed.")
    (folder / _REMOVED).mkdir(exist_ok=True)
    (folder / _REMOVED / name).touch()


def _invited(path: Path) -> _Invited | None:
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
        return _Invited(str(said["population"]), int(said["expires_s"]), int(said["uses"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The invitation {path} cannot be read.") from error


def _name(population: str, device: str) -> str:
    return hashlib.sha256(b"shoal member v1\0" + population.encode() + b"\0" + device.encode()).hexdigest()
