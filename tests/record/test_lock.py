"""One process writes a run at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.errors import StoreError
from shoal.record.lock import only_writer

HOLD = """
import sys, time
from pathlib import Path
from shoal.record.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.integration
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"another process \\(number {holder.pid}\\)"), only_writer(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with only_writer(tmp_path):
        pass
