"""How a store is opened: what is the same for all its tables, and is not in its files."""

from dataclasses import dataclass
from typing import final

from shoal import validate
from shoal.clock import Clock, SystemClock
from shoal.embed.tail import Tail


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """As `EmbeddingStore.open` takes them, which says what each is."""

    read_only: bool = False
    direct: bool = True
    engine: str = "auto"
    threads: int = 8
    tail: Tail | None = None
    tidy: bool = True
    remember: int = 0
    clock: Clock | None = None

    def __post_init__(self) -> None:
        validate.flags(read_only=self.read_only, direct=self.direct, tidy=self.tidy)
        validate.one_of(("auto", "aio", "threads"), engine=self.engine)
        validate.whole(1, threads=self.threads)
        validate.between(1, 1024, threads=self.threads)
        validate.whole(0, remember=self.remember)
        validate.between(0, 2**32, remember=self.remember)
        validate.of_kind(Tail | None, "a shoal.embed.Tail or None", tail=self.tail)
        validate.of_kind(Clock | None, "a shoal.clock.Clock or None", clock=self.clock)

    @property
    def ticking(self) -> Clock:
        """The clock that was given, or the machine's."""
        return SystemClock() if self.clock is None else self.clock
