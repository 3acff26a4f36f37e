"""What a model at a context needs of a machine, known before the machine is booked: compiled, computed, searched."""
