"""Real Kafka brokers of the versions that the tests are for, run by the Java of this machine from jars that Maven fetches.

`shared_kafka` gives a broker that all processes of a run share; a test that breaks its brokers makes its own `KafkaCluster`.
"""

from __future__ import annotations

from .cluster import KafkaCluster, prepare
from .endpoints import Endpoints
from .network import Network
from .programs import VERSIONS, Version
from .rights import rights
from .settings import ADMIN, Listener
from .shared import PREFIX, VARIABLE, Run, running, shared_kafka
from .wire import Refused, Right, Wire

__all__ = [
    "ADMIN",
    "PREFIX",
    "VARIABLE",
    "VERSIONS",
    "Endpoints",
    "KafkaCluster",
    "Listener",
    "Network",
    "Refused",
    "Right",
    "Run",
    "Version",
    "Wire",
    "prepare",
    "rights",
    "running",
    "shared_kafka",
]
