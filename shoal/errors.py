"""The errors of shoal, one tree.

Callers' mistakes are `ValueError` or `TypeError`; our own bugs are `assert`. What remains is a `ShoalError`::

    ShoalError
      TransportError
        DeadlineExceeded        nobody answered in time: try again
        NetworkError            the link broke: try again
        ProtocolError           the peer is wrong: do not try again
      DataError                 data that cannot be had, or is not what it says
        TooFewExamples          not enough of them, or not a whole number of batches; there may be more later
      DeviceError               a device failed (device_id, round, stage)
      PlanError                 a plan that is unsigned, altered, too large, or not for this runtime
      ProgramError              a program of a plan failed, whatever it raised
      RoundError
        InvalidTransition       an event that the machine's state does not allow
        QuorumNotReached        too few devices reported
      UpdateRefused             an update that may not be counted (reason)
      StoreError                the run store cannot do it (newer schema, missing blob)
        StoreUnavailable        not now: the disk is full or fails, or another process writes: try again
        LeaseHeld               the run belongs to another process for now (holder, expires_s)
        LeaseLost               another process has taken the run over: this one can write no more
      PodGaveUp                 a pod whose lives ended without progress, or that had too few hosts
      MissingExtra              an optional library is needed
"""


class ShoalError(Exception):
    """Base of all errors that shoal raises for what happens outside the caller's code."""


class TransportError(ShoalError):
    """A message could not be exchanged with a peer."""


class DeadlineExceeded(TransportError):
    """The peer did not answer in time; trying again is right."""


class NetworkError(TransportError):
    """The connection broke or could not be made; trying again is right."""


class ProtocolError(TransportError):
    """The peer sent something that it must not; trying again is wrong."""


class DataError(ShoalError):
    """Data cannot be had, or is not what its description says."""


class TooFewExamples(DataError):
    """A member has too few examples for a task; where they come and go it may have enough later."""


class DeviceError(ShoalError):
    """A device failed in a stage of a round."""

    def __init__(self, message: str, *, device_id: str = "", round: int = -1, stage: str = "") -> None:
        super().__init__(message)
        self.device_id, self.round, self.stage = device_id, round, stage


class PlanError(ShoalError):
    """A plan is refused: signature, hash, size, operations or runtime are not right."""


class TaskRefused(PlanError):
    """A plan promises less than the device asks for; the device may serve others."""

    def __init__(self, message: str, *, task: str) -> None:
        super().__init__(message)
        self.task = task


class ProgramError(ShoalError):
    """A program of a plan failed; `program` names it."""

    def __init__(self, message: str, *, program: str = "") -> None:
        super().__init__(message)
        self.program = program


class RoundError(ShoalError):
    """A round cannot go on."""


class InvalidTransition(RoundError):
    """A machine was given an event that its state does not allow; the message carries its story."""


class QuorumNotReached(RoundError):
    """Fewer devices reported than the task's minimum."""


class UpdateRefused(ShoalError):
    """An update may not be counted; `reason` is a short word that the device is told."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class StoreError(ShoalError):
    """The run store cannot do what was asked."""


class StoreUnavailable(StoreError):
    """The disk is full or fails, or another process has been writing; nothing was lost, trying again is right."""


class LeaseHeld(StoreError):
    """The run belongs to another process: `holder`, until `expires_s` (epoch seconds) unless it renews its lease."""

    def __init__(self, message: str, *, holder: str, expires_s: float) -> None:
        super().__init__(message)
        self.holder, self.expires_s = holder, expires_s


class LeaseLost(StoreError):
    """Another process has taken the run over; whoever gets this must stop serving it."""


class BudgetSpent(ShoalError):
    """A budget does not allow what is to be taken from it; nothing was."""


class PodGaveUp(ShoalError):
    """A pod ended without having finished: its lives came no further, or there were too few hosts. The text says why."""


class MissingExtra(ShoalError):
    """An optional library is missing."""

    def __init__(self, library: str, *, extra: str, why: str) -> None:
        super().__init__(
            f"{why} needs {library}, which is not installed. Install it with: pip install 'shoal[{extra}]'."
        )
        self.library, self.extra = library, extra
