"""The pytest plugin of brokerkit."""
