"""One device's block of attention; one file a backend, all with one contract."""
