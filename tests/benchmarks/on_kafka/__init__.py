"""What is measured on a real Kafka."""
