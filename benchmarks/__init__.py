"""Measurements of specexit; not installed. A package, so that no other `benchmarks` on the path is taken for it."""
