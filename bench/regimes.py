"""Allocator regimes, because page faults decide what eager torch costs on a CPU.

All are plain environment variables, read by glibc when a process starts; the benchmark therefore
runs every regime in a process of its own.

stock: nothing set. glibc maps every block above 32 MB afresh and unmaps it when it is freed, so
    each (N, V) temporary of eager code is faulted in 4 KB at a time, again and again. This is what
    a user gets who has not thought about it.
huge: huge pages and nothing else, the one switch that is usually advised (hugetlb=1 means madvise,
    which the usual kernel setting `transparent_hugepage/enabled = madvise` honours). Temporaries
    are still faulted in and zeroed each time, 2 MB at once.
tuned: huge pages, and big blocks come from the heap instead of being mapped (mmap_max=0), which is
    never given back (trim_threshold above any heap), so that after a warm-up no temporary faults
    at all: what a caching allocator does. Its price: the process keeps its peak memory for good,
    and fragmentation goes unbounded. The fastest for eager that we found, so the hardest to beat:
    on the 2-core machine of the results, sparse eager and the official dense loss at N=512 V=50257
    fp32 took 126 and 341 ms stock, 36 and 100 ms huge, 34 and 103 ms with torch's own
    THP_MEM_ALLOC_ENABLE=1, 27 and 79 ms with cached blocks alone, and 25 and 72 ms tuned.
"""

import os

REGIMES = {
    "stock": {},
    "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "tuned": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
        f":glibc.malloc.trim_threshold={16 << 30}"
    },
}

CHOICES = {
    **{name: [name] for name in REGIMES},
    "both": ["stock", "tuned"],
    "all": list(REGIMES),
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
