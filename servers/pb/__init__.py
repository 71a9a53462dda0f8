"""Code generated from proto/shmcoord_cluster.proto."""
