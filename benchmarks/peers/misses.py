"""libCacheSim's misses, in its own environment: misses.py FILE, an .npz with `ids` and `capacities`; prints JSON, {policy: [misses]}."""

import json
import sys

import libcachesim
import numpy as np

POLICIES = {"lru": "LRU", "s3-fifo": "S3FIFO", "w-tinylfu": "WTinyLFU"}


def misses(policy: str, capacity: int, ids: list[int]) -> int:
    cache, request, missed = getattr(libcachesim, policy)(cache_size=capacity), libcachesim.Request(), 0
    request.obj_size = 1
    for id in ids:
        request.obj_id = id
        missed += not cache.get(request)
    return missed


def main() -> None:
    with np.load(sys.argv[1]) as file:
        ids, capacities = file["ids"].tolist(), file["capacities"].tolist()
    print(json.dumps({name: [misses(rival, size, ids) for size in capacities] for name, rival in POLICIES.items()}))


if __name__ == "__main__":
    main()
