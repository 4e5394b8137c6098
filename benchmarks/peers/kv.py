"""One rival in its own environment: loads rows in a given order, answers queries, says what it read. Prints one JSON line.

kv.py lmdb | rocksdict | sqlite FOLDER: FOLDER/input.npz has `values` (rows, dim), `key_of` (rows,) the key of each row, `indptr` and
`ids` of the queries, `warm` (how many of them only warm up) and `dram` (bytes).

Reads: sqlite and rocksdict keep their own cache of `dram` bytes, and every miss is a system call, counted in /proc/self/io
(rocksdict with direct reads). LMDB reads by the page cache, which cannot be bounded for one process without privileges: its
leaf pages, as many rows a page as it made, go through an LRU list of `dram` bytes.
"""

import json
import sqlite3
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np


def reads_so_far() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]) // 4096


def main(kind: str, folder: Path) -> None:
    data = np.load(folder / "input.npz")
    values, key_of, indptr, ids = data["values"], data["key_of"], data["indptr"], data["ids"]
    warm, dram = int(data["warm"]), int(data["dram"])
    row_of = np.argsort(key_of)
    begun = time.perf_counter()
    pairs = ((int(key), values[row].tobytes()) for key, row in enumerate(row_of))
    reads = np.zeros(len(indptr) - 1, np.int64)
    seconds = np.zeros(len(reads))
    if kind == "sqlite":
        base = sqlite3.connect(folder / "t.sqlite")
        base.execute("PRAGMA page_size = 4096")
        base.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)")
        base.executemany("INSERT INTO t VALUES (?, ?)", pairs)
        base.commit()
        loaded = time.perf_counter() - begun
        base.execute(f"PRAGMA cache_size = {max(1, dram // 4096)}")
        base.execute("PRAGMA mmap_size = 0")
        get = lambda keys: [base.execute("SELECT v FROM t WHERE k = ?", (k,)).fetchone()[0] for k in keys]  # noqa: E731
        scan = lambda: sum(1 for _ in base.execute("SELECT v FROM t"))  # noqa: E731
    elif kind == "rocksdict":
        from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict

        options, blocks = Options(raw_mode=True), BlockBasedOptions()
        blocks.set_block_cache(Cache(dram))
        blocks.set_block_size(4096)
        blocks.set_bloom_filter(10, False)
        options.set_block_based_table_factory(blocks)
        options.set_compression_type(DBCompressionType.none())
        options.set_use_direct_reads(True)
        base = Rdict(str(folder / "rocks"), options)
        for key, value in pairs:
            base[key.to_bytes(8, "big")] = value
        base.flush()
        base.compact_range(None, None)
        loaded = time.perf_counter() - begun
        get = lambda keys: [base[int(k).to_bytes(8, "big")] for k in keys]  # noqa: E731
        scan = lambda: sum(1 for _ in base.keys())  # noqa: E731, SIM118
    else:
        import lmdb

        base = lmdb.open(str(folder / "lmdb"), map_size=1 << 32, readahead=False)
        with base.begin(write=True) as writing:
            for key, value in pairs:
                writing.put(key.to_bytes(8, "big"), value, append=True)
        base.sync()
        loaded = time.perf_counter() - begun
        reading = base.begin()
        get = lambda keys: [reading.get(int(k).to_bytes(8, "big")) for k in keys]  # noqa: E731
        scan = lambda: sum(1 for _ in reading.cursor())  # noqa: E731
        leaves = base.stat()["leaf_pages"]
        per_page = -(-len(values) // max(1, leaves))
    pages: OrderedDict[int, None] = OrderedDict()
    for query in range(len(reads)):
        keys = key_of[np.unique(ids[indptr[query] : indptr[query + 1]])].tolist()
        before, start = reads_so_far(), time.perf_counter()
        found = get(keys)
        seconds[query] = time.perf_counter() - start
        assert found[0] is not None
        if kind != "lmdb":
            reads[query] = max(0, reads_so_far() - before)
            continue
        for page in {key // per_page for key in keys}:
            if page in pages:
                pages.move_to_end(page)
                continue
            reads[query] += 1
            pages[page] = None
            if len(pages) > max(1, dram // 4096):
                pages.popitem(last=False)
    start = time.perf_counter()
    scan()
    scanned = time.perf_counter() - start
    print(json.dumps({
        "reads": reads[warm:].tolist(), "seconds": seconds[warm:].tolist(), "load_s": loaded, "scan_s": scanned,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
