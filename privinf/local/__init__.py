"""Parties on one machine, as processes of one user, and what only these load."""
