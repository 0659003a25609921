"""Benchmark on a GPU: `python bench/run.py --device cuda`. Documented in bench/README.md."""
