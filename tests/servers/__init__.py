"""Real servers for the tests: Redis 7 (Debian's), Valkey 9 (of a wheel) and Kafka (of Maven), ended by who started them.

`shared` gives a server that all tests of one process use one after the other, each on an empty one; a test that breaks its
server makes its own `RedisServer`.  Kafka is in `kafka`.  ``python -m tests.servers`` is `make servers`.
"""

from __future__ import annotations

from .access import ADMIN, COMMANDS, USER, rules
from .certificates import Certificates, certificates
from .programs import FLAVORS, Flavor, Missing, program, require
from .proxy import Proxy
from .server import RedisServer, shared, stop_shared

__all__ = [
    "ADMIN",
    "COMMANDS",
    "FLAVORS",
    "USER",
    "Certificates",
    "Flavor",
    "Missing",
    "Proxy",
    "RedisServer",
    "certificates",
    "program",
    "require",
    "rules",
    "shared",
    "stop_shared",
]
