"""The project's version; pyproject.toml reads it from here. Layer 0: imports nothing of the project."""

__version__ = "0.1.0"
