"""Encrypted linear algebra: products of what one party knows with what the other knows, as shares of both, by ring-LWE."""
