"""Redis 7 and newer, and Valkey: topics and queues on one server."""

from ._driver import RedisDriver

__all__ = ["RedisDriver"]
