"""What a round cost its members, summed over them: time by phase, bytes, padding. Never kept for one device."""

import json
from math import isfinite
from typing import Self

from shoal.errors import ProtocolError
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.record.store import UsageRow
from shoal.tensors import PARSE_ERRORS, parse_json

PHASES = ("compute", "compile", "data", "wait", "wire")
MOST_SECONDS = 1e6  # a device may say anything; what is beyond reason is not added


class Costs:
    """Running totals over the members of one group."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.padding = self.joules = 0.0
        self.members = 0
        self.down_bytes = self.up_bytes = 0
        """What the Edge sent and took in: devices of one process share what they fetch."""

    def add(self, costs: pb.Costs) -> None:
        """Adds one member's."""
        for phase in PHASES:
            self.seconds[phase] += _sane(getattr(costs, f"{phase}_s"))
        self.padding += _sane(costs.padding) * _sane(costs.compute_s)
        self.joules += _sane(costs.joules)
        self.members += 1

    def merge(self, other: "Costs") -> None:
        """Adds another group's."""
        for phase in PHASES:
            self.seconds[phase] += other.seconds[phase]
        self.padding += other.padding
        self.joules += other.joules
        self.members += other.members
        self.down_bytes += other.down_bytes
        self.up_bytes += other.up_bytes

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote. Raises ProtocolError for anything else."""
        costs = cls()
        try:
            value = parse_json(text.encode())
            costs.seconds = {phase: _sane(float(value["seconds"][phase])) for phase in PHASES}
            costs.padding, costs.joules = float(value["padding"]), float(value["joules"])
            costs.members, costs.down_bytes = int(value["members"]), int(value["down_bytes"])
            costs.up_bytes = int(value["up_bytes"])
        except PARSE_ERRORS as error:
            raise ProtocolError(f"Expected the costs of a group, got {text[:60]!r}: {error}.") from error
        return costs

    def rows(self, round: int) -> list[UsageRow]:
        """As the record keeps them. `padding` is the part of compute that went into padding."""
        rows = [UsageRow(round=round, phase=p, seconds=s, count=self.members) for p, s in self.seconds.items()]
        rows.append(UsageRow(round=round, phase="padding", seconds=self.padding, count=self.members))
        rows.append(UsageRow(round=round, phase="pull", bytes_down=self.down_bytes, count=self.members))
        rows.append(UsageRow(round=round, phase="push", bytes_up=self.up_bytes, count=self.members))
        return rows


def _sane(value: float) -> float:
    return value if isfinite(value) and 0.0 <= value <= MOST_SECONDS else 0.0
