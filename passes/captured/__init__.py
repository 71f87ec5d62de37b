"""Passes on the captured ATen training graph."""
