"""How a server process keeps what it takes from the system small."""

import ctypes
import sys

_M_ARENA_MAX = -8  # malloc.h of glibc


def use_one_arena() -> None:
    """Makes glibc's malloc keep one pool for all threads; does nothing on other systems.

    Slices pass from a thread that receives them to one that stores them. With a pool for each thread every pool grows to
    the largest burst it has seen: measured 2x the memory with 50 devices pushing at once, at the same speed.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
