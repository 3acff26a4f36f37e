"""What `ring_rl.lm.generate` is made of."""
