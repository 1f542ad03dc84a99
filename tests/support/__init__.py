"""What tests of several folders share; pytest puts ``tests/`` on the path (pyproject.toml)."""
