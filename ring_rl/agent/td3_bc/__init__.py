"""TD3+BC (arXiv:2106.06860): offline reinforcement learning by twin critics and an actor held near the data."""
