import subprocess
import sys

import shoal.data


def test_public_names_are_sorted_and_there():
    assert shoal.data.__all__ == sorted(shoal.data.__all__)
    assert all(
        getattr(shoal.data, name).__doc__ for name in shoal.data.__all__ if name not in {"Block", "Spec", "Split"}
    )


def test_importing_starts_no_jax_and_no_optional_library():
    code = "import sys, shoal.data; print({'jax', 'pyarrow', 'rich', 'pip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
