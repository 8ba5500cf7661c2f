"""Tests of the Redis driver against real servers."""
