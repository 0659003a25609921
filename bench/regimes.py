"""Two allocator regimes, because page faults decide what eager torch costs on a CPU.

Both are plain environment variables, read by glibc when a process starts; the benchmark therefore
runs every regime in a process of its own.

stock: nothing set. glibc maps every block above 32 MB afresh and unmaps it when it is freed, so
    each (N, V) temporary of eager code is faulted in 4 KB at a time, again and again. This is what
    a user gets who has not thought about it.
tuned: glibc asks for huge pages (hugetlb=1 means madvise, which the usual kernel setting
    `transparent_hugepage/enabled = madvise` honours), serves big blocks from the heap instead of
    mapping them (mmap_max=0), and never gives the heap back (trim_threshold above any heap), so
    that after a warm-up no temporary faults at all. On the 2-core machine of the results, sparse
    eager and the official dense loss at N=512 V=50257 fp32 took 126 and 341 ms stock, 36 and 100 ms
    with hugetlb=1 alone, 34 and 103 ms with torch's THP_MEM_ALLOC_ENABLE=1, 27 and 79 ms with
    cached blocks alone, and 25 and 72 ms with both: the fastest for eager, so the hardest to beat.
    Its price: the process keeps its peak memory for good, and fragmentation goes unbounded.
"""

import os

REGIMES = {
    "stock": {},
    "tuned": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
        f":glibc.malloc.trim_threshold={16 << 30}"
    },
}

# Whatever the caller's shell sets here would turn "stock" into something else.
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")


def process_environment(regime: str) -> dict[str, str]:
    """os.environ with exactly the allocator settings of `regime`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ALLOCATOR_VARIABLES and not name.startswith("MALLOC_")
    }
    return kept | REGIMES[regime]
