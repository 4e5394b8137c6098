"""The rounds of a simulation, in order: a tuple that also becomes a table."""

from typing import TYPE_CHECKING, Any, final

from shoal.errors import MissingExtra

if TYPE_CHECKING:
    from shoal.simulate.engine import RoundResult


@final
class History(tuple["RoundResult", ...]):
    """Rounds, the first one first."""

    __slots__ = ()

    def columns(self) -> dict[str, list[Any]]:
        """A table by columns: `version`, `members` (how many), `seconds`, then each metric, NaN where it was not measured."""
        names = dict.fromkeys(name for result in self for name in result.metrics)
        return {
            "version": [result.version for result in self],
            "members": [len(result.members) for result in self],
            "seconds": [result.seconds for result in self],
            **{name: [result.metrics.get(name, float("nan")) for result in self] for name in names},
        }

    def to_pandas(self) -> Any:
        """The table as a `pandas.DataFrame`, a row for each round, by `version`.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("pandas", extra="pandas", why="A history as a data frame") from error
        return pandas.DataFrame(self.columns()).set_index("version")
