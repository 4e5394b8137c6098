"""Frames of named tensors over two pipes: how a runner and its child process speak. No pickle, no JAX.

A message is one frame of `tensors.pack`: a header (JSON) and arrays. It is written and read piece by piece, so that a
model of 200 MB is never copied into one buffer: nothing is copied on the way out, and each array once on the way in.
"""

import os
import sys
from collections.abc import Mapping
from io import BufferedReader, BufferedWriter, FileIO
from typing import Any, Final, Self, final

import numpy as np

from shoal.tensors import Tensors, frame_parts, read_frame

PIPE_BYTES: Final = 1 << 20  # what Linux allows an ordinary user; halves the time of a large model
BUFFER_BYTES: Final = 64 << 10


@final
class Channel:
    """One end of a pair of pipes. One message at a time in each direction; not thread-safe."""

    def __init__(self, reader: FileIO, writer: FileIO) -> None:
        self._pipes = reader, writer
        # A short message is one system call each way; what is larger than a buffer goes past it.
        self._reader, self._writer = BufferedReader(reader, BUFFER_BYTES), BufferedWriter(writer, BUFFER_BYTES)
        _widen(writer.fileno())

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes one message. Raises OSError if nobody reads it."""
        for part in frame_parts(tensors or {}, header):
            self._writer.write(part)
        self._writer.flush()

    def receive(self, *, most_bytes: int) -> tuple[Tensors, dict[str, Any]]:
        """Reads one message. Raises EOFError at the end of the stream, ProtocolError for anything but a message."""
        return read_frame(self._fill, most_bytes=most_bytes)

    def close(self) -> None:
        for pipe in self._pipes:  # not the buffers, which would wait for whoever reads or writes now
            pipe.close()

    @classmethod
    def of_standard_streams(cls) -> Self:
        """Takes the process's standard input and output for itself: what is printed later goes to standard error."""
        reader, writer = os.dup(0), os.dup(1)  # not inherited by further processes
        if sys.platform == "win32":
            import msvcrt

            msvcrt.setmode(reader, os.O_BINARY)
            msvcrt.setmode(writer, os.O_BINARY)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        return cls(FileIO(reader, "r"), FileIO(writer, "w"))

    def _fill(self, view: memoryview) -> None:
        while view:
            if not (count := self._reader.readinto(view)):
                raise EOFError("The stream ended.")
            view = view[count:]


def _widen(pipe: int) -> None:
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # the user's pipes are used up: slower, not wrong
            pass
