"""Made-up traces with the marks of real ones: communities, a hot head, users with habits, drift, a flash crowd.

A table has rows in communities of lognormal size (median 48), some rows in two. Communities are asked for by a Zipf
law, rows inside them by another; half a per cent of the rows, whatever their community, are hot for everybody. A user
has 3 to 8 communities and asks half the time for what it asked for last. A query is a bag of distinct ids, its
size 1 + NegBin. Between epochs rows change community, are born and die; in one epoch a community is
asked for 50 times as much during 1 % of the queries. All is seeded. `patterns` makes the inputs that have no
structure to use, and those that are hard on a cache.

The eight tables are those of Bandana (Eisenman et al., 2019, arXiv 1811.05922, their table 1; second-hand) at 1:100:
lookups for each vector, not lookups, are kept, so that the share of compulsory misses is near theirs. Nothing else of the
paper's data is known; what comes out is described by `describe`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from shoal import validate
from shoal.embed._compiled import compiled
from shoal.embed.trace import Trace

HISTORY: Final = 256
MOST_INTERESTS: Final = 8


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """What a made-up table is like."""

    name: str
    rows: int
    mean_bag: float
    """Mean ids of a query, 1 or more."""
    compulsory: float
    """Distinct ids over lookups, about: it sets how many queries there are."""
    cold: float
    """Share of the other lookups that are uniform over all rows: it brings in rows that nobody asks for again."""
    from_history: float = 0.5
    """Share of lookups that repeat what the user asked for before."""
    from_head: float = 0.15
    """Share of the other lookups that go to the hot head."""
    drift: float = 0.02
    """Share of rows that change community, between one epoch and the next."""
    births: float = 0.01
    """Share of rows that are born, and that die, between epochs."""
    epochs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        validate.positive(rows=self.rows, epochs=self.epochs, compulsory=self.compulsory)
        validate.between(1, 1e4, mean_bag=self.mean_bag)
        validate.between(0, 1, cold=self.cold, from_history=self.from_history, from_head=self.from_head)
        validate.between(0, 0.2, drift=self.drift, births=self.births)

    @property
    def num_queries(self) -> int:
        """So many that the share of compulsory misses comes out about right, if most rows are asked for."""
        return max(self.epochs, int(0.9 * self.rows / self.compulsory / self.mean_bag))


def tables(scale: float = 1.0, *, seed: int = 0) -> list[TableKind]:
    """The eight tables; `scale` multiplies their rows."""
    kinds = [
        (100_000, 35, 0.04), (100_000, 93, 0.02), (200_000, 27, 0.20), (200_000, 25, 0.22),
        (100_000, 30, 0.06), (100_000, 54, 0.03), (100_000, 54, 0.02), (200_000, 18, 0.60),
    ]  # fmt: skip
    return [
        TableKind(
            name=f"table{number}",
            rows=max(200, int(rows * scale)),
            mean_bag=bag,
            compulsory=compulsory,
            cold=min(0.8, 1.5 * compulsory),
            from_history=0.5 * (1 - compulsory),
            seed=seed * 100 + number,
        )
        for number, (rows, bag, compulsory) in enumerate(kinds, 1)
    ]


@dataclass(frozen=True, eq=False)
class Generated:
    """A made-up table's trace, and what is known of it because it is made up."""

    kind: TableKind
    trace: Trace
    """Ids in the order in which the rows came to be: neighbours have something in common."""
    community_order: np.ndarray
    """(rows,) the rows community by community at the start, most asked for first: what an oracle would place."""
    name_of: np.ndarray
    """(rows,) the id of each row of the generator's own count."""

    def permuted(self) -> Trace:
        """The same trace with ids at random: the order says nothing."""
        return self.trace.renamed(np.random.default_rng(self.kind.seed + 1).permutation(self.kind.rows))


def generate(kind: TableKind) -> Generated:
    """Makes a table's trace. The same kind gives the same trace."""
    return next(_worlds(kind, kind.epochs, 0))


def futures(kind: TableKind, from_epoch: int, number: int) -> Iterator[Trace]:
    """What might have happened from an epoch on: users, communities and drift are those of `generate(kind)`, the draws are others.

    A placement learnt from many of these knows all that can be known of the true trace beforehand: `bounds.py` says for what.

    Yields:
        `number` traces of epochs `from_epoch` to the last; ids are named as in `generate(kind).trace`.
    """
    validate.between(0, kind.epochs - 1, from_epoch=from_epoch)
    worlds = _worlds(kind, from_epoch, number)
    next(worlds)
    for world in worlds:
        yield world.trace


def _worlds(kind: TableKind, from_epoch: int, number: int) -> Iterator[Generated]:
    """The true trace, then `number` others that part from it at an epoch."""
    rng = np.random.default_rng(kind.seed)
    members, starts = _communities(kind.rows, rng)
    popularity = _shares(len(starts) - 1, rng.uniform(0.9, 1.1), rng)
    newborn = rng.permutation(kind.rows)[: int(kind.births * kind.rows) * (kind.epochs - 1)]
    first_members = members.copy()
    unborn = np.isin(members, newborn)
    members[unborn] = rng.choice(members[~unborn], int(unborn.sum()))
    num_users = max(4, kind.num_queries // 20)
    users = _users(num_users, popularity, rng)
    head = rng.permutation(kind.rows)[: max(1, kind.rows // 200)]
    world = _World(kind, starts, popularity, users, head, exponent=1 / (1 - rng.uniform(0.6, 0.8)))
    history = np.full((num_users, HISTORY), -1, np.int32), np.zeros(num_users, np.int64)
    parts, known = list[tuple[np.ndarray, np.ndarray]](), [members]
    at_parting = history
    for epoch in range(kind.epochs):
        if epoch == from_epoch:
            at_parting = history[0].copy(), history[1].copy()
        parts.append(world.epoch(rng, epoch, members, history))
        members = _drifted(members, starts, kind, newborn, epoch, rng)
        known.append(members)
    true = _in_creation_order(kind, _trace_of(parts, kind.rows), first_members, starts, rng)
    yield true
    for future in range(number):
        rng = np.random.default_rng([kind.seed, future])
        history = at_parting[0].copy(), at_parting[1].copy()
        parts = [world.epoch(rng, epoch, known[epoch], history) for epoch in range(from_epoch, kind.epochs)]
        yield replace(true, trace=_trace_of(parts, kind.rows).renamed(true.name_of))


@dataclass(frozen=True)
class _World:
    """What stays as it is while queries are drawn."""

    kind: TableKind
    starts: np.ndarray
    popularity: np.ndarray
    users: tuple[np.ndarray, np.ndarray]
    head: np.ndarray
    exponent: float

    def epoch(
        self, rng: np.random.Generator, epoch: int, members: np.ndarray, history: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sizes of an epoch's queries and their ids; the histories of users go on."""
        kind = self.kind
        num = kind.num_queries // kind.epochs
        sizes = (
            1 + rng.negative_binomial(2, 2 / (2 + kind.mean_bag - 1), num)
            if kind.mean_bag > 1
            else np.ones(num, np.int64)
        )
        sizes = np.minimum(sizes, kind.rows // 2).astype(np.int64)
        flash = np.array(
            [num // 2, num // 2 + num // 100, rng.integers(len(self.popularity))]
            if epoch == kind.epochs // 2
            else [-1, -1, 0]
        )
        share = min(0.5, 50 * float(self.popularity[flash[2]]))
        who = np.searchsorted(_until(len(history[1]), 0.7), rng.random(num)).astype(np.int64)
        head_until = np.cumsum(np.arange(1, len(self.head) + 1) ** -1.05)
        made = np.empty(sizes.sum(), np.int64)
        length = _epoch(
            rng, sizes, who, *self.users, members, self.starts, self.exponent, self.head, head_until / head_until[-1],
            *history, np.array([kind.from_history, kind.from_head, kind.cold, share]), flash, kind.rows, made,
        )  # fmt: skip
        return length, made[: length.sum()]


def _trace_of(parts: Sequence[tuple[np.ndarray, np.ndarray]], rows: int) -> Trace:
    lengths = np.concatenate([length for length, _ in parts])
    return Trace(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([ids for _, ids in parts]), rows)


def _communities(rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Members of all communities one after another, and where each begins; a tenth of the rows are in two."""
    twice = rng.permutation(rows)[: rows // 10]
    members = np.concatenate([rng.permutation(rows), twice])
    sizes = np.maximum(2, rng.lognormal(np.log(48), 0.8, 2 * len(members) // 48 + 4)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.append(starts[starts < len(members) - 2], len(members))
    of = rng.integers(0, rows, len(twice))  # the second home of a row is anywhere
    members[rows:], members[of] = members[of], twice
    return members, starts


def _until(size: int, exponent: float) -> np.ndarray:
    shares = np.cumsum(np.arange(1.0, size + 1) ** -exponent)
    return np.asarray(shares / shares[-1])


def _shares(size: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    shares = np.arange(1.0, size + 1) ** -exponent
    return rng.permutation(shares / shares.sum())


def _users(num_users: int, popularity: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each user's communities (users, 8) and the running sum of their shares, Dirichlet(0.3)."""
    drawn = np.searchsorted(np.cumsum(popularity), rng.random((num_users, MOST_INTERESTS)))
    number = rng.integers(3, MOST_INTERESTS + 1, num_users)
    shares = rng.standard_gamma(0.3, (num_users, MOST_INTERESTS)) + 1e-12
    shares[np.arange(MOST_INTERESTS) >= number[:, None]] = 0
    until = np.cumsum(shares, axis=1)
    return np.minimum(drawn, len(popularity) - 1), until / until[:, -1:]


def _drifted(
    members: np.ndarray, starts: np.ndarray, kind: TableKind, newborn: np.ndarray, epoch: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows change places between communities, neighbours in rank change places, some die and as many are born."""
    members = members.copy()
    moved = rng.permutation(len(members))[: int(kind.drift * len(members))]
    members[moved] = members[rng.permutation(moved)]
    near = rng.permutation(len(members) - 1)[: len(members) // 10]
    for at in near:
        members[at], members[at + 1] = members[at + 1], members[at]
    each = int(kind.births * kind.rows)
    born = newborn[epoch * each : (epoch + 1) * each]
    members[rng.permutation(len(members))[: len(born)]] = born
    return members


def _in_creation_order(
    kind: TableKind, trace: Trace, members: np.ndarray, starts: np.ndarray, rng: np.random.Generator
) -> Generated:
    """Names the rows by the time they came to be: a community grows during a tenth of all time."""
    born = np.zeros(kind.rows)
    begins = rng.random(len(starts) - 1)
    born[members] = np.repeat(begins, np.diff(starts)) + 0.1 * rng.random(len(members))
    name_of = np.empty(kind.rows, np.int64)
    name_of[np.argsort(born, kind="stable")] = np.arange(kind.rows)
    _, first = np.unique(members, return_index=True)
    return Generated(kind, trace.renamed(name_of), name_of[members[np.sort(first)]], name_of)


@compiled
def _epoch(
    rng: np.random.Generator,
    sizes: np.ndarray,
    who: np.ndarray,
    interests: np.ndarray,
    interest_until: np.ndarray,
    members: np.ndarray,
    starts: np.ndarray,
    exponent: float,
    head: np.ndarray,
    head_until: np.ndarray,
    history: np.ndarray,
    history_size: np.ndarray,
    shares: np.ndarray,
    flash: np.ndarray,
    rows: int,
    made: np.ndarray,
) -> np.ndarray:
    """Draws the queries of one epoch into `made`; returns their sizes."""
    last_query, length, end = np.full(rows, -1, np.int64), np.zeros(len(sizes), np.int64), 0
    from_history, from_head, cold, from_flash = shares[0], shares[1], shares[2], shares[3]
    for query in range(len(sizes)):
        user = who[query]
        begin, known = end, min(history_size[user], HISTORY)
        is_flash = flash[0] <= query < flash[1]
        for _ in range(3 * sizes[query]):
            if end - begin == sizes[query]:
                break
            kind = rng.random()
            if known > 0 and rng.random() < from_history:
                id = history[user, int(rng.random() * known)]
            elif kind < cold:
                id = int(rng.random() * rows)
            elif kind < cold + from_head:
                id = head[np.searchsorted(head_until, rng.random())]
            else:
                community = flash[2]
                if not is_flash or rng.random() >= from_flash:
                    community = interests[user, np.searchsorted(interest_until[user], rng.random())]
                size = starts[community + 1] - starts[community]
                id = members[starts[community] + int(size * rng.random() ** exponent)]
            if last_query[id] != query:
                last_query[id] = query
                made[end] = id
                end += 1
        for at in range(begin, end):
            history[user, history_size[user] % HISTORY] = made[at]
            history_size[user] += 1
        length[query] = end - begin
    return length


def patterns(rows: int, num_queries: int, mean_bag: int, *, seed: int = 0) -> dict[str, Trace]:
    """Inputs without structure to use, or hard on a cache.

    Returns:
        random: uniform bags. scan: every id in turn. bag of one: uniform single ids. hot block: 32 ids that are one
        block in id order, and nothing else. big bag: bags of a quarter of the rows.
    """
    rng = np.random.default_rng(seed)

    def trace(ids: np.ndarray) -> Trace:
        return Trace(np.arange(0, ids.size + 1, ids.shape[1]), ids.reshape(-1).astype(np.int64), rows)

    total = num_queries * mean_bag
    return {
        "random": trace(rng.integers(0, rows, (num_queries, mean_bag))),
        "scan": trace((np.arange(total) % rows).reshape(num_queries, mean_bag)),
        "bag of one": trace(rng.integers(0, rows, (num_queries, 1))),
        "hot block": trace(rng.integers(0, min(32, rows), (num_queries, min(8, mean_bag)))),
        "big bag": trace(
            np.stack([rng.permutation(rows)[: max(1, rows // 4)] for _ in range(max(4, 4 * total // rows))])
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a trace is like, in figures that can be compared with published ones."""

    num_queries: int
    lookups: int
    mean_bag: float
    distinct: int
    compulsory: float
    """Distinct ids over lookups."""
    top_1_percent: float
    """Share of lookups that go to the most asked for 1 % of the distinct ids."""
    top_10_percent: float
    used_once: float
    """Share of distinct ids that are asked for once."""
    mean_reuse: float
    reuse_histogram: tuple[tuple[str, float, float], ...]
    """For each range of lookups a row: share of distinct ids, share of lookups."""


def describe(trace: Trace) -> Description:
    """The figures of a trace."""
    counts = np.sort(trace.counts())[::-1]
    counts = counts[counts > 0]
    total, distinct = int(counts.sum()), len(counts)
    edges = [1, 2, 4, 16, 64, 256, 1024, np.iinfo(np.int64).max]
    rows = []
    for low, high in pairwise(edges):
        kept = counts[(counts >= low) & (counts < high)]
        name = f"{low}" if high == low + 1 else f"{low}-{high - 1}" if high < 2000 else f"{low}+"
        rows.append((name, len(kept) / max(1, distinct), float(kept.sum()) / max(1, total)))
    return Description(
        num_queries=len(trace),
        lookups=total,
        mean_bag=total / max(1, len(trace)),
        distinct=distinct,
        compulsory=distinct / max(1, total),
        top_1_percent=float(counts[: max(1, distinct // 100)].sum()) / max(1, total),
        top_10_percent=float(counts[: max(1, distinct // 10)].sum()) / max(1, total),
        used_once=float((counts == 1).mean()) if distinct else 0.0,
        mean_reuse=total / max(1, distinct),
        reuse_histogram=tuple(rows),
    )
