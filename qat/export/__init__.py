"""Artifacts: files for runtimes, the proof that they predict the same, and the report."""
