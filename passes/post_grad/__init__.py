"""Passes on Inductor's graphs, after partitioning."""
