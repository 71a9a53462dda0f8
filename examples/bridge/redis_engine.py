"""An engine of one's own: frames through a Redis server that is there anyway.

Named in `bridge.toml` by `engine = "redis"` once a package of yours has the entry point

    [project.entry-points."shmcoord.bridges"]
    redis = "your_package.redis_engine:RedisBridge"

Each host publishes on a channel of its own and is subscribed to those of the others. Redis knows
no presence, so a host that is silent for a lease is taken for gone, which is a hint and no more.
Who may publish on which channel is a matter of Redis's users (ACL SETUSER h1 ...
&shmcoord/prod/h1).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time

import redis

from shmcoord.bridge.engine import EngineConfig, EngineError, LinkState, Listener

URL = "redis://127.0.0.1:6379"
PRESENT, BYE = b"p", b"b"  # first byte of a message; FRAME has the frame behind it
FRAME = b"f"
# Frames that wait to be sent. The next one says more than those before it, so few are enough.
WAITING_MOST = 2


class RedisBridge:
    """Carries frames over the channels of a Redis server; `settings.url` says where it is."""

    def __init__(self) -> None:
        self._outbox: queue.Queue[bytes] = queue.Queue(WAITING_MOST)
        self._heard: dict[str, float] = {}  # host -> when; only while it is there
        self._dropped = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, config: EngineConfig, listener: Listener) -> None:
        """Connect once, to know that it is possible; then go on in threads."""
        self._config, self._listener = config, listener
        self._keepalive_s = config.lease_s / 4
        self._own = self._channel(config.host)
        self._hosts = {self._channel(host).encode(): host for host in config.hosts}
        try:
            self._client().ping()
        except redis.RedisError as error:
            raise EngineError(f"Redis cannot be reached: {error}") from error
        for work in (self._send, self._receive):
            thread = threading.Thread(target=self._for_ever, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def publish(self, frame: bytes) -> bool:
        """Put it into the queue, if there is room."""
        if self._ended.is_set() or not self._threads:
            return False
        try:
            self._outbox.put_nowait(FRAME + frame)
        except queue.Full:
            self._dropped += 1
            return False
        return True

    def links(self) -> LinkState:
        """Tell who was heard within a lease."""
        with self._lock:
            return LinkState(frozenset(self._heard), self._dropped, "Redis")

    def stop(self) -> None:
        """Say good-bye, so that nobody has to wait for a lease to run out."""
        if self._ended.is_set() or not self._threads:
            return
        self._ended.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(redis.RedisError):
            self._client().publish(self._own, BYE)
        with self._lock:
            self._heard.clear()

    # --- the two threads

    def _for_ever(self, work) -> None:  # type: ignore[no-untyped-def]
        """Do it again whenever the server was lost."""
        while not self._ended.is_set():
            client = self._client()
            try:
                work(client)
            except redis.RedisError:
                self._ended.wait(self._keepalive_s)
            finally:
                client.close()

    def _send(self, client: redis.Redis) -> None:
        while not self._ended.is_set():
            try:
                message = self._outbox.get(timeout=self._keepalive_s)
            except queue.Empty:
                message = PRESENT
            client.publish(self._own, message)

    def _receive(self, client: redis.Redis) -> None:
        with client.pubsub(ignore_subscribe_messages=True) as channels:  # type: ignore[no-untyped-call]
            channels.subscribe(*self._hosts)
            client.publish(self._own, PRESENT)  # whoever is there hears of us at once
            while not self._ended.is_set():
                message = channels.get_message(timeout=self._keepalive_s)
                if message is not None:
                    self._take(self._hosts[message["channel"]], message["data"])
                self._forget_the_silent()

    def _take(self, host: str, message: bytes) -> None:
        if message[:1] == BYE:
            self._note(host, there=False)
            return
        self._note(host, there=True)
        if message[:1] == FRAME:
            self._listener.on_frame(host, message[1:])

    def _forget_the_silent(self) -> None:
        limit = time.monotonic() - self._config.lease_s
        for host in [host for host, at in list(self._heard.items()) if at < limit]:
            self._note(host, there=False)

    def _note(self, host: str, *, there: bool) -> None:
        with self._lock:
            known = host in self._heard
            if there:
                self._heard[host] = time.monotonic()
            else:
                self._heard.pop(host, None)
        if known != there:
            self._listener.on_host(host, there)

    def _client(self) -> redis.Redis:
        url = self._config.settings.get("url", URL)
        return redis.Redis.from_url(url, socket_timeout=2 * self._config.lease_s)

    def _channel(self, host: str) -> str:
        return f"shmcoord/{self._config.realm}/{host}"
