"""A prepared model run with a look at each site; ranges from data."""
