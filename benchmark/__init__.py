"""CompatBench: the benchmark of compatible representation learning."""

__version__ = "0.1.0"
