"""`shoal embed`: look into an embedding store, place its rows by a trace, replay policies, put a price on memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen, Stopwatch
from shoal.cli.work_lines import WorkLines
from shoal.embed.progress import Meter

if TYPE_CHECKING:
    import numpy as np

    from shoal.embed import Layout, Trace

app = typer.Typer(
    help="Embedding tables on block storage: inspect a store, place its rows, replay policies, choose how much memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=options.examples("shoal embed inspect stores/items", "shoal embed replay clicks.npz --out clicks.png"),
)

INSPECT_EPILOG = options.examples(
    "shoal embed inspect stores/items", "shoal embed inspect stores/items --verify --json"
)
PLACE_EPILOG = options.examples(
    "shoal embed place stores/items clicks.npz",
    "shoal embed place stores/items clicks.npz --table users --most-blocks 500",
)
REPLAY_EPILOG = options.examples(
    "shoal embed replay clicks.npz", "shoal embed replay clicks.npz --dim 64 --out clicks.png"
)
TUNE_EPILOG = options.examples(
    "shoal embed tune clicks.npz --price dram=4.0,nvme=0.1",
    "shoal embed tune clicks.npz --price dram=4.0,nvme=0.1 --p99 500us --device flash --rows 1e9",
)
POLICIES: Final = ("lru", "s3-fifo", "w-tinylfu")
SHARES: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PICTURES: Final = (".png", ".svg", ".pdf")
_FEW_ROWS: Final = 10**7
"""So many rows can be replayed however few of them are asked for."""

Store = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="An .npz with indptr and ids: which rows each query asked for.")
]
Table = Annotated[str, typer.Option("--table", help="Which table; the only one if not given.")]
Dim = Annotated[int, typer.Option("--dim", min=1, help="Values of a vector.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or int8.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where the picture goes; beside the trace if not given.")]


@app.command("inspect", epilog=INSPECT_EPILOG)
def inspect(
    store: Store,
    verify: Annotated[bool, typer.Option("--verify", help="Read every block and check it.")] = False,
    json: options.AsJson = False,
) -> None:
    """Show the tables of a store: where they are and why, blocks, memory, wear, the write budget."""
    from dataclasses import asdict

    from shoal.embed import EmbeddingStore

    screen, watch = Screen(json=json), Stopwatch()
    with EmbeddingStore.open(store, read_only=True) as opened:
        watch.lap("open")
        told = opened.statistics()
        damaged = opened.verify(progress=WorkLines(screen)) if verify else {}
        watch.lap("verify")
    rows = [
        (
            name,
            f"{t.rows:,}",
            t.tier,
            f"{t.num_blocks:,}",
            f"{t.delta_blocks:,}",
            words.size(t.dram_bytes),
            words.size(t.map_bytes),
            f"{t.most_worn}",
            t.reason,
        )
        for name, t in told.tables.items()
    ]
    screen.table(("table", "rows", "in", "blocks", "delta", "memory", "map", "worn", "why"), rows)
    screen.line(
        f"epoch {told.epoch}, journal {words.size(told.journal_bytes)}, written so far {words.size(told.written_bytes)}"
    )
    screen.line(f"write budget: {_budget(told.budget_bytes)}")
    if not all(t.is_direct for t in told.tables.values()):
        screen.say("this file system has no O_DIRECT: reads go through the page cache, and their times say little")
    for name, blocks in damaged.items():
        screen.line(
            f"{name}: {words.count(len(blocks), 'damaged block')}{': ' if blocks else ''}{blocks[:10] if blocks else ''}"
        )
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"store: {store}")
    screen.document({**asdict(told), "damaged": damaged})
    if any(damaged.values()):
        raise typer.Exit(1)


def _budget(num_bytes: float) -> str:
    if num_bytes < 0:
        return f"overdrawn by {words.size(-num_bytes)} of your own writes; the store tidies up again when time has made that good"
    return f"{words.size(num_bytes)} may be written on the store's own account now"


@app.command("place", epilog=PLACE_EPILOG)
def place(
    store: Store,
    trace: TraceFile,
    table: Table = "",
    most_blocks: Annotated[
        int,
        typer.Option(
            "--most-blocks", min=0, help="Write so many blocks at most, those that save most reads; 0 is no limit."
        ),
    ] = 0,
    space: Annotated[
        float,
        typer.Option(
            "--space",
            min=0.0,
            max=1.0,
            help="Copies of rows, as a part of all rows: they save reads, and serve where a block is late or damaged.",
            show_default="none",
        ),
    ] = 0.0,
    effort: Annotated[
        Literal["normal", "high"],
        typer.Option(
            "--effort",
            help="How long to look for a placement; high takes two to ten times as long, which may save a per cent of the reads.",
        ),
    ] = "normal",
    json: options.AsJson = False,
) -> None:
    """Learn from a trace where the rows of a table should lie and which cache it should have, and write that."""
    from shoal.embed import EmbeddingStore, Trace

    screen, watch = Screen(json=json), Stopwatch()
    with EmbeddingStore.open(store) as opened:
        name = table or _only(list(opened.tables), store)
        if name not in opened.tables:
            raise ValueError(f"Expected --table to be one of {', '.join(opened.tables)}, got {name!r}.")
        learned = Trace.load(trace, num_rows=opened.tables[name].rows)
        watch.lap("open")
        told = opened.retrain(
            {name: learned}, most_blocks=most_blocks or None, effort=effort, space=space, progress=WorkLines(screen)
        )[name]
        watch.lap("place")
    by = "replayed over the trace that it was learned from" if most_blocks else "foretold by the trace's last 30 %"
    screen.line(
        f"{name}: {told['reads_before']:.4g} block reads a query before, {told['reads_after']:.4g} after ({by})"
    )
    screen.line(f"in {told['tier']}: {told['reason']}")
    screen.line(
        f"cache: {told['policy']}, {words.size(told['cache_bytes'])}; {words.count(told['written_blocks'], 'block')} written"
    )
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"store: {store}")
    screen.document({"table": name, **told})


def _only(names: list[str], store: Path) -> str:
    if len(names) != 1:
        raise ValueError(f"Expected --table, as {store} has several: {', '.join(names)}.")
    return names[0]


@app.command("replay", epilog=REPLAY_EPILOG)
def replay(
    trace: TraceFile, dim: Dim = 32, dtype: Dtype = "float32", out: Out = None, json: options.AsJson = False
) -> None:
    """Replay a trace over memory sizes, placements and evictions: hit rate and block reads a query, as a picture.

    Placement is learned on the first half; the rest is replayed."""
    screen, watch = Screen(json=json), Stopwatch()
    picture = out or trace.with_suffix(".png")
    if picture.suffix not in PICTURES:
        raise ValueError(f"Expected --out to end in {', '.join(PICTURES)}, got {str(picture)!r}.")
    case = _Case(trace, dim, dtype, screen)
    watch.lap("place")
    curves = case.curves(screen)
    watch.lap("replay")
    _draw(curves, case, picture)
    watch.lap("draw")
    columns = ("placement", "eviction", *[f"{100 * share:g} %" for share in SHARES])
    screen.line(f"block reads a query, {case.name}, over memory as a part of the table:")
    screen.table(columns, [(p, e, *[f"{reads:.3g}" for _, reads in points]) for (p, e), points in curves.items()])
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"wrote: {picture}")
    made = [
        {
            "placement": p,
            "eviction": e,
            "shares": list(SHARES),
            "hit_rates": [h for h, _ in x],
            "reads": [r for _, r in x],
        }
        for (p, e), x in curves.items()
    ]
    screen.document({"trace": str(trace), "curves": made, "out": str(picture)})


class _Case:
    """A trace, split, and the placements to compare."""

    def __init__(self, path: Path, dim: int, dtype: str, screen: Screen) -> None:
        from shoal.embed import Cache, Layout, Trace
        from shoal.embed.blockfile import block_bytes_for
        from shoal.embed.codec import DTYPES, Codec
        from shoal.embed.placement import place

        if dtype not in DTYPES:
            raise ValueError(f"Expected --dtype to be one of {', '.join(DTYPES)}, got {dtype!r}.")
        whole = Trace.load(path)
        if len(whole) < 20:
            raise ValueError(f"Expected a trace of at least 20 queries, {path} has {len(whole)}.")
        _refuse_gaps(whole, path)
        self.name, self.rows, self.row_bytes = path.stem, whole.num_rows, Codec(dim, dtype).row_bytes
        self.per_block = block_bytes_for(self.row_bytes) // self.row_bytes
        self.train, self.test = whole.split(0.5, 0.5)
        heat, size = self.train.counts(), max(self.per_block, self.rows // 20)
        meter = Meter(WorkLines(screen), f"placing by {len(self.train):,} queries", self.rows, "rows")
        placed = place(
            self.train, self.per_block, lambda: Cache("s3-fifo", size, self.rows), progress=meter.reach
        ).hot_first(heat)
        self.layouts: dict[str, Layout] = {"id order": Layout.in_id_order(self.rows, self.per_block), "placed": placed}
        self.offers = self._offers(placed, heat)

    def _offers(self, placed: "Layout", heat: "np.ndarray") -> "np.ndarray":
        from shoal.embed.placement import depth_above

        return depth_above(placed, heat, 10)

    def capacity(self, share: float, policy: str) -> int:
        from shoal.embed import Cache

        return min(self.rows, Cache.capacity_of(share * self.rows * self.row_bytes, self.row_bytes, policy))

    def run(self, layout: str, policy: str, share: float, *, offer: bool) -> Any:
        """A replay of the second half, the cache warm from a part of it."""
        from shoal.embed import Cache
        from shoal.embed.simulate import replay as replay_trace

        cache = Cache(policy, self.capacity(share, policy), self.rows)
        offers = self.offers if offer and layout == "placed" else None
        return replay_trace(self.test, self.layouts[layout], cache, offers, skip=len(self.test) // 3)

    def curves(self, screen: Screen) -> dict[tuple[str, str], list[tuple[float, float]]]:
        """(placement, eviction) -> (hit rate, reads a query) at each share."""
        made: dict[tuple[str, str], list[tuple[float, float]]] = {}
        kinds = [("id order", False, ""), ("placed", False, ""), ("placed", True, " + neighbours")]
        meter = _replays(screen, len(kinds))
        for layout, offer, more in kinds:
            for policy in POLICIES:
                found = []
                for share in SHARES:
                    found.append(self.run(layout, policy, share, offer=offer))
                    meter.advance()
                made[layout, policy + more] = [(1 - one.miss_ratio, one.reads_per_query) for one in found]
        return made


def _replays(screen: Screen, kinds: int) -> Meter:
    """Of the replays of so many kinds of placement, with each policy at each size."""
    return Meter(WorkLines(screen), "replaying", kinds * len(POLICIES) * len(SHARES), "caches")


def _refuse_gaps(trace: "Trace", path: Path) -> None:
    """Raises ValueError where ids are hashes or the like: a replay takes memory for each row up to the highest."""
    if trace.num_rows > _FEW_ROWS and trace.num_rows > 1000 * trace.num_lookups:
        raise ValueError(
            f"Expected the rows of a table numbered from 0, {path} has {trace.num_lookups:,} lookups with ids up to "
            f"{trace.num_rows - 1:,}. Number the ids anew, for example with np.unique(ids, return_inverse=True)[1]."
        )


def _draw(curves: dict[tuple[str, str], list[tuple[float, float]]], case: _Case, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(POLICIES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axes, place_of, label in zip(figure.subplots(1, 2), (0, 1), ("hit rate", "block reads a query"), strict=True):
        for (layout, eviction), points in curves.items():
            style = ":" if layout == "id order" else "-" if "neighbours" in eviction else "--"
            axes.plot(
                [100 * share for share in SHARES],
                [point[place_of] for point in points],
                style,
                marker="o",
                markersize=3,
                color=colours[eviction.split(" ")[0]],
                label=f"{layout}, {eviction}",
            )
        axes.set_xscale("log")
        axes.set_xticks([100 * share for share in SHARES])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("memory, % of the table")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{case.name}: {case.rows:,} rows of {case.row_bytes} B, {case.per_block} a block")
    figure.legend(
        *figure.axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=7.5, handlelength=3.5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


@app.command("tune", epilog=TUNE_EPILOG)
def tune(
    trace: TraceFile,
    price: Annotated[str, typer.Option("--price", help="Money a GB: dram=4.0,nvme=0.1")],
    p99: Annotated[
        str, typer.Option("--p99", help="A query's reads must end within this for 99 %: 500us, 2ms. None if empty.")
    ] = "",
    device: Annotated[
        str, typer.Option("--device", help="The model of the drive: optane, flash or flash-read.")
    ] = "flash",
    rows: Annotated[
        float, typer.Option("--rows", min=0, help="Rows of the real table, if the trace is a sample; 0: the trace's.")
    ] = 0,
    dim: Dim = 32,
    dtype: Dtype = "float32",
    json: options.AsJson = False,
) -> None:
    """What memory and drive cost for each policy and size, and the cheapest that holds a p99. Latency is that of a model."""
    from shoal.embed.devices import DEVICES, replay_latency

    screen, watch = Screen(json=json), Stopwatch()
    prices, limit_s = _prices(price), _seconds(p99) if p99 else float("inf")
    if device not in DEVICES:
        raise ValueError(f"Expected --device to be one of {', '.join(DEVICES)}, got {device!r}.")
    case = _Case(trace, dim, dtype, screen)
    watch.lap("place")
    table_gb = (rows or case.rows) * case.row_bytes / 1e9
    found: list[dict[str, Any]] = [
        {
            "placement": "-",
            "eviction": "all in memory",
            "share": 1.0,
            "reads": 0.0,
            "p99_us": 0.0,
            "money": table_gb * prices["dram"],
        }
    ]
    meter = _replays(screen, len(case.layouts))
    for layout in case.layouts:
        for policy in POLICIES:
            for share in SHARES:
                one = case.run(layout, policy, share, offer=True)
                late = replay_latency(one.reads, DEVICES[device]).percentile(99)
                money = table_gb * (share * prices["dram"] + prices["nvme"])
                found.append({
                    "placement": layout, "eviction": policy, "share": share, "reads": one.reads_per_query,
                    "p99_us": 1e6 * late, "money": money,
                })  # fmt: skip
                meter.advance()
    watch.lap("replay")
    fit = [one for one in found if one["p99_us"] <= 1e6 * limit_s]
    cheapest = min(fit, key=lambda one: (one["money"], one["reads"]))
    found.sort(key=lambda one: (one["money"], one["reads"]))
    screen.table(
        ("placement", "eviction", "memory", "reads a query", "p99 (model)", "money", ""),
        [_row(one, cheapest, fit) for one in found],
    )
    screen.line(
        f"cheapest{f' with p99 <= {p99}' if p99 else ''}: {cheapest['placement']}, {cheapest['eviction']}, "
        f"{100 * cheapest['share']:g} % of the table in memory: {cheapest['money']:.4g}"
    )
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"trace: {trace}")
    screen.document({"device": device, "mixes": found, "cheapest": cheapest})


def _row(one: dict[str, Any], cheapest: dict[str, Any], fit: list[dict[str, Any]]) -> tuple[str, ...]:
    mark = "<- cheapest" if one is cheapest else "" if one in fit else "too slow"
    return (
        one["placement"], one["eviction"], f"{100 * one['share']:g} %", f"{one['reads']:.3g}", f"{one['p99_us']:.0f} us",
        f"{one['money']:.4g}", mark,
    )  # fmt: skip


def _prices(text: str) -> dict[str, float]:
    """Raises ValueError unless both prices are given once, above zero."""
    try:
        made = {name.strip(): float(number) for name, number in (part.split("=") for part in text.split(","))}
    except ValueError:
        made = {}
    if set(made) != {"dram", "nvme"} or not all(0 < number < float("inf") for number in made.values()):
        raise ValueError(f"Expected --price dram=MONEY,nvme=MONEY, each for a GB and above zero, got {text!r}.")
    return made


def _seconds(text: str) -> float:
    for unit, factor in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit):
            try:
                number = float(text[: -len(unit)])
            except ValueError:
                break
            if number > 0:
                return number * factor
            break
    raise ValueError(f"Expected --p99 like 500us, 2ms or 1s, got {text!r}.")
