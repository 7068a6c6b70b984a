"""The rules of the ledger: state in, message in, time in, entries out.

Nothing here reads a clock, a database or a broker, so the same code serves a live message, a sweep,
a simulation and an audit.
"""
