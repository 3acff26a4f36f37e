"""Who explores, and how episodes are collected."""
