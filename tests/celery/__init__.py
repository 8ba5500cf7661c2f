"""Tests of Celery on brokerkit: its messages, its workers and its command, on real servers."""
