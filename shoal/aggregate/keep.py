"""Rounds that only measure: the sums are read as metrics, the model stays as it is."""

from shoal.aggregate.accumulator import Accumulator
from shoal.errors import QuorumNotReached
from shoal.record.store import Blobs
from shoal.tensors import Index


class Keep:
    """An `Aggregator` of evaluations."""

    needs = "sum"

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        if not sums.members:
            raise QuorumNotReached("Nobody has evaluated the model.")
        return model, server_state
