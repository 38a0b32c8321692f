"""The version: the package metadata and the native module take it from here."""

__version__ = "0.1.0.dev0"
