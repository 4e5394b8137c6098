"""What a check-in must say for a run to take the device. Pure; the same before one Edge and before several."""

from typing import Final

from shoal.errors import PlanError, ProtocolError
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest, Runtime

MAX_DEVICE_ID_BYTES: Final = 200
MAX_WORD: Final = 100
"""Characters of a kind of runtime or a platform, and of what else is said back."""
MAX_PLATFORMS: Final = 16
MAX_CREDENTIAL_BYTES: Final = 1_024


def check_device_id(device: str) -> None:
    """Raises ProtocolError unless it is a device's name."""
    if not 0 < len(device.encode()) <= MAX_DEVICE_ID_BYTES:
        raise ProtocolError(f"Expected a device id of 1 to {MAX_DEVICE_ID_BYTES} bytes.")


def needs(check_in: pb.CheckIn, manifest: Manifest, *, population: str) -> str:
    """What the run of that plan and population needs that this device is not, in words; "" where it may take it.

    Raises:
        ProtocolError: the check-in names no runtime.
    """
    task = manifest.task
    if (of := check_in.population or "default") != population:
        return f"a device of population {population!r}; this one is of {of[:MAX_WORD]!r} (--population)"
    if check_in.tasks and task not in check_in.tasks:
        return f"a device that serves task {task!r}; this one serves {[each[:MAX_WORD] for each in check_in.tasks[:3]]}"
    if task in check_in.unfit:
        return f"examples that fit task {task!r}; this device's do not"
    try:
        manifest.pick(runtime_of(check_in.runtime))
    except PlanError as error:
        return str(error)
    return ""


def essence(check_in: pb.CheckIn) -> pb.CheckIn:
    """What has to be kept of a check-in that `needs` nothing, to be said to a run's Edge: small, whatever else it holds."""
    return pb.CheckIn(population=check_in.population, device_id=check_in.device_id, runtime=check_in.runtime)


def shown(check_in: pb.CheckIn) -> pb.CheckIn:
    """What says who a device is, and by what right it comes: small, whatever else it holds."""
    return pb.CheckIn(
        population=check_in.population,
        device_id=check_in.device_id,
        credential=check_in.credential[:MAX_CREDENTIAL_BYTES],
    )


def runtime_of(info: pb.RuntimeInfo) -> Runtime:
    """Raises ProtocolError where it is none."""
    if len(info.version) != 3:
        raise ProtocolError(f"Expected a runtime version of three numbers, got {list(info.version)[:4]}.")
    if len(info.platforms) > MAX_PLATFORMS or any(len(word) > MAX_WORD for word in (info.kind, *info.platforms)):
        raise ProtocolError(
            f"Expected a runtime of at most {MAX_PLATFORMS} platforms, it and them named in at most {MAX_WORD} characters."
        )
    major, minor, patch = info.version
    return Runtime(
        kind=info.kind,
        version=(major, minor, patch),
        calling_convention=info.calling_convention,
        platforms=tuple(info.platforms),
    )
