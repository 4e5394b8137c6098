"""What a device keeps, over restarts and power cuts: one SQLite file with a schema of its own, no SQL library.

In it: device state by run, what was spent (revealed updates, privacy of examples), the work in hand (a training that was interrupted, an
update that is not counted yet), the last contribution to each run, what each day has cost the machine, and small facts by name. Models
lie beside it (`kept_model.py`). Without a folder the same tables are in memory, and end with the process.

What is written is on the disk when the call returns, and nobody but the owner may read the file (`record/private_file.py`). It holds what the
device was sent and what it made of its own examples; never an example, and nothing secret of another device.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from shoal.errors import ProtocolError, StoreError
from shoal.record.private_file import PrivateFile
from shoal.tensors import Tensors, pack, unpack

FILE_NAME: Final = "device.sqlite"
VERSION: Final = 1
_KIND: Final = 0x53684476
MOST_STATE_BYTES: Final = 512 << 20
"""Of the device state of all runs together; of more, that of the run which was heard of longest ago is forgotten."""
MOST_WORK_BYTES: Final = 512 << 20
"""Of one work in hand; a larger one is not kept over a restart."""
DAYS_KEPT: Final = 60

_SCHEMA: Final = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE state (
    run TEXT, device TEXT, used_s REAL NOT NULL, size INTEGER NOT NULL, tensors BLOB NOT NULL, PRIMARY KEY (run, device)
);
CREATE TABLE spent (device TEXT, digest BLOB, PRIMARY KEY (device, digest)) WITHOUT ROWID;
CREATE TABLE examples (device TEXT, rho REAL NOT NULL);
CREATE INDEX examples_of ON examples (device);
CREATE TABLE work (
    place TEXT, device TEXT, expires_s REAL NOT NULL, content BLOB NOT NULL, PRIMARY KEY (place, device)
);
CREATE TABLE contribution (place TEXT, device TEXT, wall_s REAL NOT NULL, PRIMARY KEY (place, device));
CREATE TABLE day (
    number INTEGER PRIMARY KEY, cpu_s REAL NOT NULL, moved_bytes INTEGER NOT NULL, battery_percent REAL NOT NULL,
    peak_bytes INTEGER NOT NULL
);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What taking part has cost this machine on one day."""

    cpu_s: float = 0.0
    """Processor seconds, over all cores."""
    moved_bytes: int = 0
    """Down and up."""
    battery_percent: float = 0.0
    """By how much the charge fell while it worked."""
    peak_bytes: int = 0
    """Most memory at a time, of all its processes."""


@final
class DeviceFile:
    """See the module's text. Calls may come from any thread; all raise StoreError where the file cannot do it."""

    def __init__(self, folder: Path | None, *, read_only: bool = False) -> None:
        """
        Args:
            folder: where the file is, or is made; None: in memory.
            read_only: for one who only looks, beside the device: what is not there is as if empty.

        Raises:
            StoreError: it cannot be opened, or a newer shoal made it.
        """
        path = None if folder is None else folder / FILE_NAME
        self._file = PrivateFile(
            path, kind="device file", application_id=_KIND, version=VERSION, schema=_SCHEMA, read_only=read_only
        )

    @property
    def is_durable(self) -> bool:
        """Whether it outlives the process."""
        return self._file.path is not None

    def close(self) -> None:
        """Nothing can be asked of it afterwards."""
        self._file.close()

    # Small facts.

    def fact(self, name: str) -> bytes | None:
        """What was kept under a name."""
        with self._file.reading() as db:
            row = db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def keep_fact(self, name: str, value: bytes) -> None:
        """Keeps a small value under a name, in place of the one before."""
        with self._file.writing() as db:
            db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    # Device state.

    def state(self, run: str, device: str) -> Tensors | None:
        """What a device kept from its last counted round of a run."""
        with self._file.reading() as db:
            row = db.execute("SELECT tensors FROM state WHERE run = ? AND device = ?", (run, device)).fetchone()
        return None if row is None else self._unpacked(row[0])

    # What was spent.

    def is_spent(self, device: str, digest: bytes) -> bool:
        """Whether an update was revealed in a sum."""
        with self._file.reading() as db:
            row = db.execute("SELECT 1 FROM spent WHERE device = ? AND digest = ?", (device, digest)).fetchone()
        return row is not None

    def spend(self, device: str, digest: bytes) -> None:
        """Writes down that an update may be revealed from now on."""
        with self._file.writing() as db:
            db.execute("INSERT OR IGNORE INTO spent VALUES (?, ?)", (device, digest))

    def rhos(self, device: str) -> list[float]:
        """The zCDP of every update that was made of a device's examples."""
        with self._file.reading() as db:
            return [rho for (rho,) in db.execute("SELECT rho FROM examples WHERE device = ?", (device,))]

    def add_rho(self, device: str, rho: float) -> None:
        """Writes down what another one spends."""
        with self._file.writing() as db:
            db.execute("INSERT INTO examples VALUES (?, ?)", (device, rho))

    # Work in hand.

    def work(self, place: str, device: str, *, wall_s: float) -> Tensors | None:
        """What was in hand when the device ended; None where there is nothing, or its token has expired."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT content FROM work WHERE place = ? AND device = ? AND expires_s > ?", (place, device, wall_s)
            ).fetchone()  # fmt: skip
        return None if row is None else self._unpacked(row[0])

    def keep_work(self, place: str, device: str, content: Tensors, *, expires_s: float) -> None:
        """Keeps the work in hand, in place of the one before; one that is too large is not kept."""
        data = pack(content)
        if len(data) > MOST_WORK_BYTES:
            return self.drop_work(place, device)
        with self._file.writing() as db:
            db.execute("INSERT OR REPLACE INTO work VALUES (?, ?, ?, ?)", (place, device, expires_s, data))

    def drop_work(self, place: str, device: str) -> None:
        """There is none any more."""
        with self._file.writing() as db:
            db.execute("DELETE FROM work WHERE place = ? AND device = ?", (place, device))

    # Contributions and costs.

    def contributed_s(self, device: str) -> float | None:
        """When an update of the device was last counted, by anybody; seconds since the epoch."""
        with self._file.reading() as db:
            (wall_s,) = db.execute("SELECT MAX(wall_s) FROM contribution WHERE device = ?", (device,)).fetchone()
        return None if wall_s is None else float(wall_s)

    def counted(self, place: str, device: str, *, run: str, state: Tensors, wall_s: float) -> None:
        """An update was counted: the work is dropped and the state it leaves is kept, at once or not at all.

        Where states take too much room, that of the run heard of longest ago is forgotten.
        """
        data = pack(state) if state else b""
        with self._file.writing() as db:
            if state:
                db.execute(
                    "INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?, ?)", (run, device, wall_s, len(data), data)
                )
                _forget_states(db)
            db.execute("DELETE FROM work WHERE place = ? AND device = ?", (place, device))
            db.execute("INSERT OR REPLACE INTO contribution VALUES (?, ?, ?)", (place, device, wall_s))

    def day(self, number: int) -> Day:
        """What a day has cost."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT cpu_s, moved_bytes, battery_percent, peak_bytes FROM day WHERE number = ?", (number,)
            ).fetchone()
        if row is None:
            return Day()
        return Day(cpu_s=row[0], moved_bytes=row[1], battery_percent=row[2], peak_bytes=row[3])

    def keep_day(self, number: int, day: Day) -> None:
        """Keeps what a day has cost so far; that of days long gone is dropped."""
        with self._file.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO day VALUES (?, ?, ?, ?, ?)",
                (number, day.cpu_s, day.moved_bytes, day.battery_percent, day.peak_bytes),
            )
            db.execute(
                "DELETE FROM day WHERE number NOT IN (SELECT number FROM day ORDER BY number DESC LIMIT ?)",
                (DAYS_KEPT,),
            )

    def _unpacked(self, data: bytes) -> Tensors:
        try:
            return unpack(data)[0]
        except ProtocolError as error:
            raise StoreError(f"The {self._file.what} is damaged: {error} Choose another --state folder.") from error


def _forget_states(db: sqlite3.Connection) -> None:
    while db.execute("SELECT COALESCE(SUM(size), 0) FROM state").fetchone()[0] > MOST_STATE_BYTES:
        db.execute("DELETE FROM state WHERE rowid = (SELECT rowid FROM state ORDER BY used_s, rowid LIMIT 1)")
