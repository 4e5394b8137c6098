"""The simulated place: a room (`shoal.simulate.engine`, …) whose name is also its main function, `shoal.simulate(…)`.

Python binds a package's name to the module as soon as anything in it is imported, so the module itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `shoal.api.simulate`."""
        from shoal.api import simulate

        return simulate(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
