"""A memory server in a process of its own, so that tests can kill real consumers, and the driver that reaches it.

Only for tests: it trusts whoever connects.  The server has a memory driver for each connection; when a connection breaks without
a farewell it cuts that driver off, as a broker sees the death of a client.
"""
