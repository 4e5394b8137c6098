"""The devices of a virtual fleet by the numbers: when they may serve, how fast they are, how often they are lost."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from shoal import validate
from shoal.errors import DataError

MOST_DEVICES: Final = 20_000_000
"""Each takes about 100 bytes."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One class of connection."""

    name: str = "wifi"
    share: float = 1.0
    """Of the devices that have it."""
    down_mbit_s: float = 50.0
    up_mbit_s: float = 10.0

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(share=self.share, down_mbit_s=self.down_mbit_s, up_mbit_s=self.up_mbit_s)


@dataclass(frozen=True, kw_only=True)
class VirtualPopulation:
    """Devices by the numbers. A file of it is TOML with these names, networks as `[[networks]]`."""

    devices: int = 100_000
    seed: int = 0
    daily_swing: float = 4.0
    """Devices that may serve at the busiest hour, over those at the quietest."""
    window_hours: float = 3.0
    """Mean length of the time a day in which a device may serve (log-normal, sigma 0.5); 24: always, every device."""
    train_s: float = 60.0
    """Median seconds that a round's training takes."""
    speed_sigma: float = 0.7
    """Spread of the devices' speeds (log-normal)."""
    round_sigma: float = 0.2
    """Spread of one device's times from round to round (log-normal)."""
    drop_out: float = 0.08
    """Share of the assignments whose device is lost before it has reported."""
    interrupted: float = 0.0
    """Share of those losses in which the device is still connected, and may report what it did where the plan takes partial
    work. A device whose window ends is always still connected."""
    networks: tuple[Network, ...] = (Network(),)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        validate.types(self)
        validate.between(1, MOST_DEVICES, devices=self.devices)
        validate.positive(train_s=self.train_s)
        validate.not_negative(speed_sigma=self.speed_sigma, round_sigma=self.round_sigma, seed=self.seed)
        validate.between(1.0, 100.0, daily_swing=self.daily_swing)
        validate.between(0.1, 24.0, window_hours=self.window_hours)
        validate.between(0.0, 0.9, drop_out=self.drop_out)
        validate.between(0.0, 1.0, interrupted=self.interrupted)
        if not self.networks:
            raise ValueError("Expected at least one network.")

    @classmethod
    def read(cls, path: Path) -> "VirtualPopulation":
        """Reads a TOML file. Raises DataError for what is wrong in it, naming what is allowed."""
        try:
            given = tomllib.loads(path.read_text())
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no TOML: {error}.") from error
        networks = given.pop("networks", [{}])
        if not isinstance(networks, list) or not all(isinstance(network, dict) for network in networks):
            raise DataError(f"{path}: expected networks as [[networks]] tables, got {networks!r}.")
        try:
            made = tuple(Network(**_numbers(network, Network, path)) for network in networks)
            return cls(**_numbers(given, cls, path), networks=made)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error


def _numbers(given: Mapping[str, Any], cls: type, path: Path) -> dict[str, Any]:
    """The settings of a table, each of its field's type."""
    types = {f.name: f.type for f in fields(cls) if f.name != "networks"}
    for name, value in given.items():
        if name not in types:
            raise DataError(f"{path}: expected settings among {', '.join(types)}; got {name!r}.")
        if types[name] is not str and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"{path}: Expected {name} to be a number, got {value!r}.")
    return {name: float(value) if types[name] is float else value for name, value in given.items()}
