"""More than one host: each is told of the others' nodes, and shows them as segments of its own.

One bridge process per host (`shmcoord bridge`) publishes what is in this host's segments and keeps
a mirror of each segment of the others, which routers open like any segment. docs/hosts.md says how
to run it, docs/bridges.md how to carry the frames by something else than Zenoh. Needs the extra
`bridge`.
"""
