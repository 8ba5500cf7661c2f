"""The applications whose workers the tests start."""
