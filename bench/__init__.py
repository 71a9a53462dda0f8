"""Benchmarks of shmcoord: one run on one machine, one table, one JSON file.

`python -m bench` runs everything; bench/README.md says what is measured and how.
"""
