"""Makes a folder with all that a device without JAX needs beside Python itself, and no more; it can be copied to devices.

    python packaging/shoal-device/bundle.py OUT [--without-blas WHEELS]
    PYTHONPATH=OUT python -m shoal.cli.device_main --server …

What `pip` installs is nearly twice as large: it brings IREE's tools and a second copy of its runtime for tracing, NumPy's tests and
compiler, and compiled Python. These are left out by name (`LEFT_OUT`). NumPy's wheels hold 28 MB of OpenBLAS, which no device
needs, as IREE computes: `--without-blas` compiles a NumPy without it, which takes a C compiler and some minutes, once for each kind
of machine and version of Python; the wheel is kept in the folder WHEELS.
"""

import argparse
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

LEFT_OUT = (
    "iree/_runtime_libs_tracy", "iree/_runtime_libs/iree-*", "iree/runtime/scripts", "pycparser*", "bin", "numpy/f2py", "numpy/distutils",
    "numpy/_core/include", "numpy/_core/lib", "numpy/_core/_simd*", "numpy/testing/tests", "**/tests", "**/*.pyi", "**/*.pxd", "**/*.h",
    "**/*.a", "**/__pycache__",
)  # fmt: skip
"""Patterns of what a device never loads."""
LOADS = (
    "import grpc.aio, iree.runtime, cryptography.hazmat.primitives.asymmetric.ed25519, shoal.cli.device_main, shoal.cli.device_process, "
    "shoal.plan.child_main, shoal.plan.iree_runner, shoal.fleet.secure_offer; shoal.plan.iree_runner.open_device(1)"
)
NUMPY = "numpy>=2.1"
PIP = (sys.executable, "-m", "pip")


def numpy_without_blas(wheels: Path) -> str:
    """A wheel of NumPy for this machine, made if the folder has none. Raises CalledProcessError where it cannot be compiled."""
    if not list(wheels.glob("numpy-*.whl")):
        none = [f"-Csetup-args=-D{name}" for name in ("allow-noblas=true", "blas=none", "lapack=none")]
        pip = [*PIP, "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "numpy"]
        subprocess.run([*pip, NUMPY, "--wheel-dir", str(wheels), *none], check=True)
    return str(max(wheels.glob("numpy-*.whl")))


def bundle(out: Path, numpy: str) -> None:
    """Fills a new folder; `numpy` is what pip takes for NumPy. Raises CalledProcessError where pip fails, or what was made cannot be loaded."""
    pip = [*PIP, "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--target", str(out), numpy, str(Path(__file__).parent)], check=True)
    for pattern in LEFT_OUT:
        for path in sorted(out.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # -S: nothing of this Python's own libraries stands in for what is missing.
    subprocess.run([sys.executable, "-S", "-B", "-c", LOADS], check=True, env={"PYTHONPATH": str(out)})


def sizes(folder: Path) -> Counter[str]:
    """Bytes of each thing in a folder of installed packages."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[path.relative_to(folder).parts[0].split(".")[0]] += path.stat().st_size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    parser.add_argument(
        "--without-blas",
        type=Path,
        metavar="WHEELS",
        help="with a NumPy without OpenBLAS, compiled here if this folder has none",
    )
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"Expected a folder that is not there yet, got {given.out}.")
    bundle(given.out, NUMPY if given.without_blas is None else numpy_without_blas(given.without_blas))
    made = sizes(given.out)
    for name, size in made.most_common(12):
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(made.values()) / 1e6:8.1f} MB  in all: {given.out}")


if __name__ == "__main__":
    main()
