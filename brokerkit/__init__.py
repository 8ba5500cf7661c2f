"""brokerkit: publish and subscribe on topics and queues, with one meaning on Kafka, on Redis and in memory."""
