"""What is alike on all servers: programs that publish to one and consume from it, and what they must not do."""
