"""Frames over Eclipse Zenoh, embedded: no server to install, nothing listened for but endpoints.

Each host puts its frames on a key of its own, `shmcoord/REALM/frame/HOST`, and shows with a
liveliness token on `shmcoord/REALM/alive/HOST` that it is there. With TLS both sides show their
certificate, and the rules made here let whoever has the certificate of a host use the keys of that
host alone. Of two hosts the one whose name comes first connects, for ever, to where the other
listens; nobody is looked for by multicast.

Zenoh runs threads of its own, which do not survive a fork: a bridge is a process of its own, and is
spawned.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import zenoh

from shmcoord.bridge.endpoints import NAME, endpoint_problem
from shmcoord.bridge.engine import EngineConfig, EngineError, LinkState, Listener

__all__ = ["ZenohBridge", "settings"]

_log = logging.getLogger("shmcoord.bridge")

_PREFIX = "shmcoord"
# How long a full queue is waited for before a frame is dropped: the next one says more.
_DROP_AFTER_US = 1_000
_RETRY_MS = (100, 500)  # between two tries to connect: first, and most
# A full link whose other end does not read holds Zenoh's close up until it is given up, which is
# when its lease has run out. For how much longer that is waited for, in seconds.
_CLOSE_S = 1.0
# What one host may send; a receiver assembles no more.
_MESSAGE_BYTES_MAX = 16 << 20


def settings(config: EngineConfig) -> dict[str, Any]:
    """Return the configuration of Zenoh for one host, by its dotted keys."""
    found: dict[str, Any] = {
        "mode": "peer",
        "listen/endpoints": list(config.listen),
        "listen/exit_on_failure": True,
        "connect/endpoints": list(config.connect),
        "connect/timeout_ms": -1,  # for ever, in the background
        "connect/exit_on_failure": False,
        "connect/retry": {
            "period_init_ms": _RETRY_MS[0],
            "period_max_ms": _RETRY_MS[1],
            "period_increase_factor": 2,
        },
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,  # all links are named; nobody introduces anybody
        "adminspace/enabled": False,
        "transport/shared_memory/enabled": False,  # it would leave files in /dev/shm
        "transport/unicast/accept_pending": max(100, len(config.hosts)),
        "transport/link/protocols": sorted({at.partition("/")[0] for at in config.listen}),
        "transport/link/tx/lease": int(config.lease_s * 1000),
        "transport/link/tx/queue/congestion_control/drop/wait_before_drop": _DROP_AFTER_US,
        "transport/link/rx/max_message_size": _MESSAGE_BYTES_MAX,
    }
    if config.tls is not None:
        certificate, key = str(config.tls.certificate), str(config.tls.key)
        found |= {
            "transport/link/tls/root_ca_certificate": str(config.tls.ca),
            "transport/link/tls/enable_mtls": True,
            "transport/link/tls/verify_name_on_connect": True,
            "transport/link/tls/listen_certificate": certificate,
            "transport/link/tls/listen_private_key": key,
            "transport/link/tls/connect_certificate": certificate,
            "transport/link/tls/connect_private_key": key,
            "access_control": _rules(config),
        }
    return found


def _rules(config: EngineConfig) -> dict[str, Any]:
    """Return who may do what: each host may speak for itself, and listen to all."""
    # What a message says of itself, and to which keys it belongs.
    speaks = ["put", "liveliness_token"]
    listens = ["declare_subscriber", "declare_liveliness_subscriber", "liveliness_query"]
    everywhere = [f"{_PREFIX}/{config.realm}/**"]

    def rule(name: str, flow: str, messages: list[str], keys: list[str]) -> dict[str, Any]:
        return {
            "id": name,
            "permission": "allow",
            "flows": [flow],
            "messages": messages,
            "key_exprs": keys,
        }

    rules = [
        rule("we speak", "egress", speaks, _keys(config, config.host)),
        rule("we listen", "egress", listens, everywhere),
        rule("they listen", "ingress", listens, everywhere),
    ]
    common = [one["id"] for one in rules]
    policies = []
    for host in config.hosts:
        rules.append(rule(f"{host} speaks", "ingress", speaks, _keys(config, host)))
        policies.append({"rules": [*common, f"{host} speaks"], "subjects": [host]})
    return {
        "enabled": True,
        "default_permission": "deny",
        "rules": rules,
        "subjects": [{"id": host, "cert_common_names": [host]} for host in config.hosts],
        "policies": policies,
    }


def _keys(config: EngineConfig, host: str) -> list[str]:
    return [f"{_PREFIX}/{config.realm}/{what}/{host}" for what in ("frame", "alive")]


def _check(config: EngineConfig) -> None:
    """Refuse what would be heard by, or would hear, more than it says."""
    for name in (config.realm, config.host, *config.hosts):
        if not NAME.fullmatch(name):
            raise EngineError(f"{name!r} is no name of a host or realm: {NAME.pattern}")
    if config.host in config.hosts:
        raise EngineError(f"{config.host} is this host, and named among the others")
    for at in (*config.listen, *config.connect):
        problem = endpoint_problem(at, has_tls=config.tls is not None, insecure=config.insecure)
        if problem is not None:
            raise EngineError(problem)


class ZenohBridge:
    """Carries frames over Zenoh."""

    def __init__(self) -> None:
        self._session: zenoh.Session | None = None
        self._publisher: zenoh.Publisher | None = None
        self._declared: list[Any] = []
        self._lock = threading.Lock()
        self._connected: set[str] = set()
        self._dropped = 0
        self._lease_s = 0.0

    def start(self, config: EngineConfig, listener: Listener) -> None:
        """Listen and begin to connect."""
        _check(config)
        self._lease_s = config.lease_s
        # It writes to the standard output, which is not ours: only for who asks, by RUST_LOG.
        zenoh.try_init_log_from_env()  # type: ignore[no-untyped-call]
        chosen = zenoh.Config()
        try:
            for key, value in settings(config).items():
                chosen.insert_json5(key, json.dumps(value))
            session = self._session = zenoh.open(chosen)
        except zenoh.ZError as error:
            raise EngineError(
                f"Zenoh cannot listen on {', '.join(config.listen)}: {error}"
            ) from error
        try:
            self._declare(session, config, listener)
        except BaseException:
            self.stop()
            raise

    def _declare(self, session: zenoh.Session, config: EngineConfig, listener: Listener) -> None:
        for host in config.hosts:
            frames, alive = _keys(config, host)
            self._declared += [
                session.declare_subscriber(frames, _direct(_frames_to(listener, host))),
                session.liveliness().declare_subscriber(
                    alive, _direct(self._hints_to(listener, host)), history=True
                ),
            ]
        frames, alive = _keys(config, config.host)
        self._publisher = session.declare_publisher(
            frames,
            congestion_control=zenoh.CongestionControl.DROP,
            priority=zenoh.Priority.INTERACTIVE_HIGH,
            express=True,  # not kept back to be sent together with others
            reliability=zenoh.Reliability.RELIABLE,
            allowed_destination=zenoh.Locality.REMOTE,
        )
        self._declared.append(session.liveliness().declare_token(alive))

    def _hints_to(self, listener: Listener, host: str) -> Callable[[zenoh.Sample], None]:
        def hint(sample: zenoh.Sample) -> None:
            up = sample.kind == zenoh.SampleKind.PUT
            with self._lock:
                (self._connected.add if up else self._connected.discard)(host)
            listener.on_host(host, up)

        return hint

    def publish(self, frame: bytes) -> bool:
        """Hand a frame to the queue of each link; Zenoh does not tell which of them dropped it."""
        publisher = self._publisher
        if publisher is None:
            return False
        try:
            publisher.put(frame)
        except zenoh.ZError:
            self._dropped += 1
            return False
        return True

    def links(self) -> LinkState:
        """Tell whose liveliness tokens are there."""
        with self._lock:
            connected = frozenset(self._connected)
        session = self._session
        peers = 0 if session is None or session.is_closed() else len(session.info.peers_zid())
        return LinkState(connected, self._dropped, f"Zenoh, {peers} links")

    def stop(self) -> None:
        """Undeclare, so that the others are told at once, and close.

        Where a link is full and its other end does not read, Zenoh needs a lease for it, and may
        try for ten seconds. That goes on in a thread which the end of the process waits for: one
        that came back from Zenoh while Python ends would abort the process.
        """
        session, self._session = self._session, None
        if session is None:
            return
        self._publisher = None
        declared, self._declared = self._declared, []
        closing = threading.Thread(
            target=_close, args=(session, declared), name="bridge_close", daemon=False
        )
        closing.start()
        closing.join(self._lease_s + _CLOSE_S)
        if closing.is_alive():
            _log.warning("a host does not read what it is sent: not waiting until Zenoh has closed")
        with self._lock:
            self._connected.clear()


def _close(session: zenoh.Session, declared: list[Any]) -> None:
    for one in reversed(declared):
        with contextlib.suppress(zenoh.ZError):  # its link has been given up
            one.undeclare()
    with contextlib.suppress(zenoh.ZError):  # that it took too long
        session.close()  # type: ignore[no-untyped-call]


def _frames_to(listener: Listener, host: str) -> Callable[[zenoh.Sample], None]:
    def take(sample: zenoh.Sample) -> None:
        listener.on_frame(host, sample.payload.to_bytes())

    return take


def _direct(callback: Callable[[zenoh.Sample], None]) -> Any:
    """Return a handler that is called in Zenoh's own thread: without one more of ours between."""
    return zenoh.handlers.Callback(callback, indirect=False)
