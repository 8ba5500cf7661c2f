"""Redis 7 and newer, and Valkey: topics and queues on one server."""
