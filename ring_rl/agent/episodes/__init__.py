"""Recorded episodes: what one is, and the formats they are kept in."""
