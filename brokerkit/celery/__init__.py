"""Celery on brokerkit: Kafka and Redis, as Celery users write it."""
