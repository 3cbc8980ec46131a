"""Independent training: every release on its own, no link to the past. The bounds of every table.

Its diagonal is the oracle of each release (the ceiling of new/new), its cross cells show what happens without
compatibility: chance.
"""

from benchmark.method import Method


class Independent(Method):
    """No compatibility: lower bound of the cross cells, oracle of the diagonal."""
