"""Plans are built once; compiled programs go into a folder of the test run, never into the user's."""

from collections.abc import Iterator

import numpy as np
import pytest

from shoal.plan.build import Built, build
from tests.plan.plan_tasks import noisy_task, tiny_task


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Built:
    return build(tiny_task())


@pytest.fixture(scope="session")
def noisy() -> Built:
    return build(noisy_task())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
