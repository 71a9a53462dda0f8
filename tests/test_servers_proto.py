from pathlib import Path

import pytest

from servers.pb import generate
from servers.pb import shmcoord_cluster_pb2 as pb

FOLDER = Path(generate.__file__).parent


def test_the_generated_code_is_up_to_date(tmp_path: Path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    assert generate.generate(tmp_path) == 0
    made = tmp_path / "servers/pb"
    # Other versions of the generator write other Python; the interface must be the same.
    namespace: dict[str, object] = {}
    line = next(
        line
        for line in (made / "shmcoord_cluster_pb2.py").read_text().splitlines()
        if line.startswith("DESCRIPTOR = ")
    )
    exec(line.replace("_descriptor_pool.Default().AddSerializedFile", "bytes"), namespace)
    assert namespace["DESCRIPTOR"] == pb.DESCRIPTOR.serialized_pb, "run: make proto"
    for file in ("shmcoord_cluster_pb2.pyi", "shmcoord_cluster_pb2_grpc.py"):
        mine, theirs = (FOLDER / file).read_text(), (made / file).read_text()
        if _version(mine) == _version(theirs):
            assert mine == theirs, "run: make proto"


def _version(text: str) -> str:
    return next((line for line in text.splitlines() if "GENERATED_VERSION =" in line), "")


def test_the_services_are_the_ones_the_hand_written_stub_names():
    stub = (FOLDER / "shmcoord_cluster_pb2_grpc.pyi").read_text()
    for service in pb.DESCRIPTOR.services_by_name.values():
        assert f"class {service.name}Stub" in stub
        for method in service.methods:
            assert f"{method.name}: _{method.name}" in stub
            assert f"async def {method.name}(" in stub


def test_no_message_of_a_result_is_one_raw_string():
    kinds = [field.name for field in pb.Column.DESCRIPTOR.oneofs_by_name["values"].fields]
    assert kinds == ["int64s", "doubles", "strings", "bools"]
