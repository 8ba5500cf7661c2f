"""Named mutants of brokerkit: small faults put into a copy of it, each of which some test must catch.

``python -m tests.mutants`` runs them all and prints the table; with names, only those.
"""
