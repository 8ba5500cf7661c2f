"""Kafka as a message system: topics, on any cluster from Kafka 3.1 on."""

from ._driver import KafkaDriver

__all__ = ["KafkaDriver"]
