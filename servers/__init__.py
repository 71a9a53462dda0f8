"""The reference cluster: six gRPC nodes that share their load through shmcoord.

`config` reads the one file that describes it, `data` holds a team's rows, `node` is the process
that serves them, `gateway` gathers the parts of a query, `client` asks; `supervisor` and `demo`
start and stop the whole. `python -m servers --help` lists what can be run.
"""
