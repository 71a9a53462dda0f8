"""The tail-latency benchmark: the same requests through every way to balance six gRPC nodes.

`python -m bench.tail run` measures, `python -m bench.tail report` makes docs/tail.md of it; what
is measured, and how, is in ../README.md.
"""
