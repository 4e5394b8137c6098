"""`shoal-device`: `shoal device --runtime iree` and `shoal predict`, from a distribution without JAX, SQLAlchemy, SciPy and typer."""

import os
import sys
from importlib import import_module
from typing import Final

from shoal.cli import plain

PREDICT: Final = "predict"
PREDICT_EXAMPLES: Final = """Examples:
  shoal-device predict kept/ images.npy --key KEY
  shoal-device predict kept/ images.npy --device anna --out predictions.npz
"""
OF_RUNS: Final = ("version", "run_id")
"""Options for run folders, which no device has."""


def main() -> None:
    """The entry point."""
    # gRPC's core writes to standard error on its own, in its own words. What this process computes is too small for
    # threads of its own; each would take memory.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _load_asyncio_without_ssl()
    if sys.argv[1:2] == [PREDICT]:
        command = plain.load_command("shoal.cli.predict", PREDICT)
        return plain.run(
            command, name=f"shoal-device {PREDICT}", epilog=PREDICT_EXAMPLES, arguments=sys.argv[2:], left_out=OF_RUNS
        )
    device = plain.load_command("shoal.cli.device", "device")
    epilog: str = import_module("shoal.cli.device").EPILOG
    plain.run(device, name="shoal-device", epilog=_examples(epilog), runtime="iree")


def _examples(epilog: str) -> str:
    """Those of `shoal device`, as they are for native code: whose it may be has to be said."""
    lines = epilog.replace(" --runtime iree --key KEY", "").replace("shoal device", "shoal-device").splitlines()
    lines += [f"  shoal-device {PREDICT} kept/ images.npy --key KEY"]
    return "\n".join(dict.fromkeys(f"{line} --key KEY" if " --server " in line else line for line in lines))


def _load_asyncio_without_ssl() -> None:
    """4 MB less: asyncio takes Python's TLS only for connections of its own, and gRPC brings another. Whoever imports `ssl` later has it."""
    if "ssl" in sys.modules or "asyncio" in sys.modules:
        return
    sys.modules["ssl"] = None  # type: ignore[assignment]  # what asyncio takes for a Python that has none
    try:
        import_module("asyncio")
    finally:
        del sys.modules["ssl"]


if __name__ == "__main__":
    main()
