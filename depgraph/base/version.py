"""The version of the library, which what it saves names."""

__version__ = "0.1.0"
