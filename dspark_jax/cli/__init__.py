"""The ``dspark`` command."""
