"""A file of the web as a source of data: over TLS, to a size, to a hash; a broken download goes on where it broke.

Only the addresses in this package's own tables are asked for. Nothing that comes is run, and where a hash is known
nothing else is used. Proxies are those of the environment, as for any Python program.
"""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from shoal.data.sources import Say
from shoal.errors import DataError

_CHUNK_BYTES = 1 << 20
_SILENCE_S = 60.0
_TRIES = 5


@final
@dataclass(frozen=True)
class Address:
    """One file by its address."""

    url: str
    """https://…; http:// only on this machine itself."""
    most_bytes: int
    """A longer file is refused."""
    sha256: str = ""
    """Of the file; '' where nobody has published one: then whoever reads it must check what is in it."""

    @property
    def name(self) -> str:
        """The file's name."""
        return urlsplit(self.url).path.rpartition("/")[2]

    @property
    def what(self) -> str:
        return f"{self.name} from {urlsplit(self.url).hostname}"

    def get(self, scratch: Path, say: Say) -> Path:
        """Downloads into `scratch`; see `sources.Source`."""
        _check(self.url)
        path = scratch / self.name
        path.touch()
        for left in reversed(range(_TRIES)):
            before = path.stat().st_size
            try:
                self._go_on(path, lambda size: say(self.what, size))
                break
            except (OSError, HTTPException) as error:
                # What brings nothing at all is not asked again: there is no network, or no such file.
                if not left or path.stat().st_size == before:
                    raise DataError(f"the download failed: {_why(error)}.") from error
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        """Raises DataError unless the file is the one at this address, where its hash is known."""
        if self.sha256 and (found := _hash(path)) != self.sha256:
            raise DataError(
                f"{self.name} has sha256 {found}, expected {self.sha256}: it is another version or damaged."
            )

    def _go_on(self, path: Path, say: Callable[[int], None]) -> None:
        """Appends what is missing of the file."""
        have = path.stat().st_size
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={have}-"} if have else {})
        opener = urllib.request.build_opener(_SafeRedirects)
        with opener.open(request, timeout=_SILENCE_S) as answer, open(path, "ab") as file:
            if have and answer.status != 206:  # it sends all from the beginning
                file.truncate(0)
                have = 0
            while chunk := answer.read(_CHUNK_BYTES):
                have += len(chunk)
                if have > self.most_bytes:
                    raise DataError(f"{self.name} is longer than {self.most_bytes} bytes: it is not what was meant.")
                file.write(chunk)
                say(have)
            if answer.length:  # http.client counts down what was announced
                raise HTTPException(f"the connection broke {answer.length} bytes before the end")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> Any:
        _check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise DataError(f"refused {parts.scheme}://{parts.hostname}: only https is asked.")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer was {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason.strerror if isinstance(reason, OSError) and reason.strerror else reason).rstrip(".") or repr(
        error
    )
