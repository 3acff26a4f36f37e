"""The tasks of ExoRL: their simulators, one by one and many at once."""
