"""Downloads, from a server in this process."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal.data.address import Address
from shoal.data.sources import Source
from shoal.errors import DataError

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends BODY; what the path says goes wrong."""

    protocol_version = "HTTP/1.0"
    asked: list[str | None]

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        ranged = self.headers.get("Range")
        self.asked.append(ranged)
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://example.org/data")
            self.end_headers()
            return
        if self.path == "/missing":
            return self.send_error(404)
        begin = int(ranged[6:-1]) if ranged and self.path != "/all-again" else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(BODY) - begin))
        self.end_headers()
        breaks = self.path in ("/breaks", "/all-again") and len(self.asked) == 1
        self.wfile.write(BODY[begin : 300_000 if breaks else None])


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    Handler.asked = []
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", Handler.asked
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def ignore(what: str, done_bytes: int) -> None:
    """Takes progress and does nothing with it."""


def test_a_file_comes_whole_and_says_how_far_it_is(server: Any, tmp_path: Path) -> None:
    said: list[int] = []
    address = Address(f"{server[0]}/data.bin", most_bytes=len(BODY), sha256=SHA256)
    assert isinstance(address, Source) and address.what == "data.bin from 127.0.0.1"
    assert address.get(tmp_path, lambda what, size: said.append(size)).read_bytes() == BODY
    assert said[-1] == len(BODY)


@pytest.mark.parametrize(("path", "second"), [("/breaks", "bytes=300000-"), ("/all-again", "bytes=300000-")])
def test_a_broken_download_goes_on(server: Any, tmp_path: Path, path: str, second: str) -> None:
    made = Address(server[0] + path, most_bytes=len(BODY), sha256=SHA256).get(tmp_path, ignore)
    assert made.read_bytes() == BODY and server[1] == [None, second]


def test_what_is_not_the_file_is_refused(server: Any, tmp_path: Path) -> None:
    cases = {
        "/data": ({"most_bytes": 1000}, "longer than 1000 bytes"),
        "/other": ({"most_bytes": len(BODY), "sha256": "0" * 64}, "has sha256 .* expected 000"),
        "/missing": ({"most_bytes": 1}, "the answer was 404"),
        "/elsewhere": ({"most_bytes": 1}, "refused http://example.org: only https"),
    }
    for path, (settings, says) in cases.items():
        with pytest.raises(DataError, match=says):
            Address(server[0] + path, **settings).get(tmp_path, ignore)
    with pytest.raises(DataError, match="only https"):
        Address("http://example.org/data", most_bytes=1).get(tmp_path, ignore)
    with pytest.raises(DataError, match="only https"):
        Address("file:///etc/passwd", most_bytes=1).get(tmp_path, ignore)


def test_without_a_network_it_says_so_at_once(server: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the download failed: Connection refused"):
        Address("http://127.0.0.1:1/data", most_bytes=1).get(tmp_path, ignore)
