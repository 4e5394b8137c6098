"""Long work on the command line: lines that stay, seldom, with rate and time left."""

import pytest

from shoal.cli.screen import Screen
from shoal.cli.work_lines import WorkLines
from shoal.embed.progress import Progress


def test_lines_tell_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [0.0]
    lines = WorkLines(Screen(json=False), now_s=lambda: now_s[0])
    for seconds, done in ((0.0, 0), (4.0, 100), (12.0, 300), (13.0, 320), (30.0, 400)):
        now_s[0] = seconds
        lines(Progress(what="items: checking", done=done, total=400, unit="blocks"))
    lines(Progress(what="users: checking", done=0, total=2, unit="blocks"))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "items: checking: 400 blocks",
        "items: checking:  75 %  25 blocks/s  4.0 s left",
        "items: checking: 100 %  13.3 blocks/s  0 ms left",
        "users: checking: 2 blocks",
    ]
