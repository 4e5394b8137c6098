"""What a caller says of a table, checks of what callers pass, and how memory is first shared out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal import validate
from shoal.embed.arrays import array_of, integers_of
from shoal.embed.blockfile import block_bytes_for
from shoal.embed.cache import POLICIES
from shoal.embed.codec import DTYPES, Codec, Dtype
from shoal.embed.layout import Layout
from shoal.embed.manifest import ADMISSIONS, TableRecord, Tier
from shoal.embed.trace import Trace
from shoal.errors import DataError

_UNITS: Final = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
SETTINGS: Final = ("policy", "admission", "read_aware", "cache_bytes", "tier", "reason")
"""What may change of a table when its rows are placed."""
_SMALL: Final = 32
"""A table below a 32nd of the memory is put there whole: no cache could save as many reads with so little."""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table of a store."""

    rows: int
    """Ids are 0 to rows - 1; below 2**31 - 2."""
    dim: int
    """Values of a vector."""
    dtype: Dtype = "float32"
    """How a vector is kept: float32, float16, or int8 with a scale and an offset a row."""
    tier: Tier = "auto"
    """`dram`: all rows in memory. `block`: in blocks behind a cache. `auto`: by size now, by lookups a byte in `retrain`."""
    policy: str = "s3-fifo"
    """Eviction of the cache: lru | s3-fifo | w-tinylfu."""
    admission: str = "threshold"
    """Which offered rows of a read block enter the cache: all that a `retrain` offers (`threshold`), or those that are asked
    for more often than the row that they would drive out (`duel`)."""
    read_aware: bool = True
    """The cache counts block reads, not misses: a row that comes with others of its block is worth less to it."""
    shadow: bool = False
    """Keep an int8 copy of all rows in memory, for lookups with a deadline."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.between(1, 2**31 - 3, rows=self.rows)
        validate.one_of(DTYPES, dtype=self.dtype)
        validate.one_of(("auto", "dram", "block"), tier=self.tier)
        validate.one_of(POLICIES, policy=self.policy)
        validate.one_of(ADMISSIONS, admission=self.admission)
        Codec(self.dim, self.dtype)

    @property
    def size_bytes(self) -> int:
        """Of all rows, encoded."""
        return self.rows * Codec(self.dim, self.dtype).row_bytes

    @property
    def shadow_bytes(self) -> int:
        return self.rows * Codec(self.dim, "int8").row_bytes if self.shadow else 0


def parse_bytes(size: str | int, what: str, *, least: int = 1) -> int:
    """`512MB`, `4GiB` or a whole number of bytes; text without a unit is refused, as it would rarely mean bytes."""
    if isinstance(size, str):
        given, text = size, size.strip().lower().replace(" ", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        unit = _UNITS.get(text[len(digits) :])
        try:
            size = int(float(digits) * unit) if unit else 0
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            raise ValueError(
                f"Expected {what} as a size like 512MB or 4GiB, or a whole number of bytes, got {given!r}."
            )
    validate.whole(least, **{what: size})
    return int(size)


def first_records(tables: Mapping[str, TableSpec], dram_bytes: int) -> list[TableRecord]:
    """The tables with their tiers and their parts of the memory, before anything is known of lookups.

    Raises:
        ValueError: what must be in memory does not fit, or two names differ only in case.
    """
    validate.of_kind(Mapping, "a mapping of names to TableSpecs", tables=tables)
    for name, spec in tables.items():
        if not isinstance(name, str) or not isinstance(spec, TableSpec):
            raise TypeError(f"Expected a name and a TableSpec for each table, got {name!r}: {spec!r}.")
    if not tables:
        raise ValueError("Expected at least one table, got none.")
    validate.distinct_in_any_case(tables, "names of tables")
    reasons = _tiers(tables, dram_bytes)
    must = sum(tables[name].size_bytes for name in reasons) + sum(spec.shadow_bytes for spec in tables.values())
    if must > dram_bytes:
        raise ValueError(
            f"Expected dram to hold the tables of tier dram and the shadows, {must} bytes, got {dram_bytes}. "
            "Give more, or put tables in blocks."
        )
    rest = dram_bytes - must
    block_bytes = sum(spec.size_bytes for name, spec in tables.items() if name not in reasons)
    return [
        _record(name, spec, reasons.get(name), int(rest * spec.size_bytes / max(1, block_bytes)))
        for name, spec in tables.items()
    ]


def _tiers(tables: Mapping[str, TableSpec], dram_bytes: int) -> dict[str, str]:
    """The tables that are put in memory, and why."""
    reasons = {name: "asked for" for name, spec in tables.items() if spec.tier == "dram"}
    free = dram_bytes - sum(spec.shadow_bytes for spec in tables.values())
    free -= sum(tables[name].size_bytes for name in reasons)
    auto = sorted((spec.size_bytes, name) for name, spec in tables.items() if spec.tier == "auto")
    if sum(size for size, _ in auto) <= free and all(spec.tier != "block" for spec in tables.values()):
        return reasons | {name: f"all tables fit in {dram_bytes} bytes" for _, name in auto}
    for size, name in auto:
        if size <= dram_bytes // _SMALL and size <= free:
            reasons[name] = f"its {size} bytes are less than a {_SMALL}nd of the memory"
            free -= size
    return reasons


def _record(name: str, spec: TableSpec, reason: str | None, cache_bytes: int) -> TableRecord:
    return TableRecord(
        name=name,
        rows=spec.rows,
        dim=spec.dim,
        dtype=spec.dtype,
        tier="block" if reason is None else "dram",
        reason=reason or ("asked for" if spec.tier == "block" else "larger than the memory that is left"),
        asked=spec.tier,
        cache_bytes=cache_bytes if reason is None else spec.size_bytes,
        policy=spec.policy,
        admission=spec.admission,
        read_aware=spec.read_aware,
        shadow=spec.shadow,
        block_bytes=block_bytes_for(Codec(spec.dim, spec.dtype).row_bytes),
        state="",
        state_hash="",
    )


def ids_of(ids: Any, table: str) -> np.ndarray:
    """Ids as (n,) int64. Raises TypeError or ValueError for what are no ids; their range is checked when they are used."""
    return integers_of(ids, f"ids of table {table!r}")


def refuse_layout(record: TableRecord, layout: Any, slots_per_block: int) -> None:
    """Raises TypeError or ValueError unless it is a layout of the table's rows in blocks like the table's."""
    validate.of_kind(Layout, "a shoal.embed.Layout, such as Layout.from_order(order, vectors_per_block)", layout=layout)
    if layout.vectors_per_block != slots_per_block or layout.num_rows != record.rows:
        raise ValueError(
            f"Expected a layout of {record.rows} rows, {slots_per_block} a block, for table {record.name!r}, got "
            f"{layout.num_rows} rows, {layout.vectors_per_block} a block."
        )


def refuse_trace(record: TableRecord, trace: Any) -> None:
    """Raises TypeError unless it is a trace, DataError unless the table has its rows."""
    if not isinstance(trace, Trace):
        raise TypeError(
            f"Expected a shoal.embed.Trace of table {record.name!r}, got {type(trace).__name__}. Make one with "
            f"Trace.of([[3, 1], [4]], num_rows={record.rows}) or Trace.load(path)."
        )
    if trace.num_rows > record.rows and trace.num_lookups and int(trace.ids.max()) >= record.rows:
        raise DataError(
            f"Expected a trace of table {record.name!r} with ids below {record.rows}, got {int(trace.ids.max())}."
        )


def refuse_bad_update(record: TableRecord, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Raises ValueError unless each id is in range and there once, with a vector of the right size."""
    if vectors.ndim != 2 or vectors.shape != (len(ids), record.dim):
        raise ValueError(
            f"Expected vectors of shape ({len(ids)}, {record.dim}) for table {record.name!r}, got {vectors.shape}."
        )
    if vectors.dtype.kind != "f":
        raise TypeError(f"Expected vectors of table {record.name!r} to be floats, got {vectors.dtype}.")
    if not len(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= record.rows:
        raise ValueError(
            f"Expected ids of table {record.name!r} from 0 to {record.rows - 1}, got {low if low < 0 else high}."
        )
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(
            f"Expected each id of an update of table {record.name!r} once, got {int(twice[0])} more than once. Add up the "
            "changes of an id, or keep its last vector."
        )


def offers_of(offered: Any, layout: Layout) -> np.ndarray:
    """How many of each block's first rows are offered to the cache, (num_blocks,) int16; None: none are."""
    if offered is None:
        return np.zeros(layout.num_blocks, np.int16)
    made = array_of(offered, "offered")
    if made.dtype.kind not in "iu":
        raise TypeError(f"Expected offered to be integers, one a block, got {made.dtype}.")
    if made.shape != (layout.num_blocks,) or not 0 <= made.min() <= made.max() <= layout.vectors_per_block:
        raise ValueError(
            f"Expected offered to be {layout.num_blocks} numbers from 0 to {layout.vectors_per_block}, one a block, got shape "
            f"{made.shape} with values up to {made.max(initial=0)}."
        )
    return made.astype(np.int16)


def offsets_of(offsets: Any, num_ids: int) -> np.ndarray:
    """Where bags begin, (bags,) int64. Raises ValueError unless they rise from 0 to at most the number of ids."""
    made = integers_of(offsets, "offsets")
    if len(made) and (made[0] != 0 or made[-1] > num_ids or np.any(np.diff(made) < 0)):
        raise ValueError(
            f"Expected offsets to rise from 0 to at most {num_ids} ids, got {made[:3]} … {made[-1]}. Bag b is "
            "ids[offsets[b]:offsets[b + 1]]; equal neighbours make an empty bag."
        )
    if not len(made) and num_ids:
        raise ValueError(f"Expected at least one offset for {num_ids} ids, got none.")
    return made
