"""Passes on the evaluation graph on its way to a file."""
