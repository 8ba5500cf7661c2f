"""What brokerkit costs, measured beside a bare program and beside its peers: `make bench`."""
