"""Tests of the Kafka driver against real brokers."""
