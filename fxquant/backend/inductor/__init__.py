"""Everything that is private to Inductor."""
