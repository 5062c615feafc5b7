"""Runtimes: what runs the files of an artifact, each behind the same calls."""
