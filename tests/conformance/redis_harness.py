"""The harness of real servers: a proxy of its own between each broker and one server for all tests of this process."""

from __future__ import annotations

from typing import Any, ClassVar

from brokerkit.broker import Broker, connect
from brokerkit.driver import Capabilities
from brokerkit.drivers.redis import RedisDriver, _scripts
from brokerkit.testing.conformance import Harness
from tests.servers import Flavor, Proxy, RedisServer, shared

_PUBLISHING = (_scripts.PUBLISH, _scripts.PUBLISH_QUEUE, _scripts.PUBLISH_TOPIC)


class RedisHarness(Harness):
    """Real time, so it is as quick as a busy machine with two cores bears."""

    column = "redis 7"
    flavor: ClassVar[Flavor] = "redis"
    lease = 1.0
    session = 1.25
    quiet = 0.4
    retention = 1.0
    topics = Capabilities(backend="redis", durable=True, replay=True, key_order=True, atomic=True)
    queues = Capabilities(
        backend="redis", durable=True, delay=True, priority=True, ttl=True, dedup=True, shared=True, atomic=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.proxies: dict[Broker, Proxy] = {}

    @property
    def server(self) -> RedisServer:
        return shared(self.flavor)

    async def open(self) -> str:
        self.server.clear()
        return self.server.url(query="session=1")

    async def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        assert not any(proxy.owed for proxy in self.proxies.values()), "a reply was to be lost, and none was"

    def connect(self, **options: Any) -> Broker:
        proxy = Proxy(self.server.host, self.server.port)
        proxy.accept()
        options.setdefault("on_event", self.events.append)
        options["options"] = {**self.options(), **options.get("options", {})}
        try:
            broker = connect(self.url.replace(f":{self.server.port}/", f":{proxy.port}/"), **options)
        except BaseException:
            proxy.close()
            raise
        self.proxies[broker] = proxy
        return broker

    another = connect

    async def crash(self, broker: Broker) -> None:
        self.proxies[broker].kill()
        # What is left of it in this process is told at once, and need not find out in seconds that nobody answers.
        hosted = self.opened(broker)._hosted
        assert hosted is not None
        assert hosted.task is not None
        hosted.task.cancel()

    def opened(self, broker: Broker) -> RedisDriver:
        driver = self.driver(broker)
        assert isinstance(driver, RedisDriver)
        return driver

    async def freeze(self, broker: Broker) -> None:
        self.proxies[broker].freeze()

    async def thaw(self, broker: Broker) -> None:
        self.proxies[broker].thaw()

    async def disconnect(self, broker: Broker) -> None:
        self.proxies[broker].disconnect()
        # Here it takes a moment until that is noticed, and what is sent meanwhile is of unknown outcome.
        context = self.opened(broker)._context
        if context is not None:
            await self.eventually(lambda: not context.link.up)

    async def reconnect(self, broker: Broker) -> None:
        self.proxies[broker].accept()

    async def lose_replies(self, broker: Broker, count: int = 1) -> None:
        self.proxies[broker].lose_replies(count, [script.sha for script in _PUBLISHING])

    async def restart(self) -> None:
        self.server.restart()


class ValkeyHarness(RedisHarness):
    column = "valkey 9"
    flavor = "valkey"
