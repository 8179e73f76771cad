"""A service in several processes: `front` listens and watches, `nursery` loads what they share and forks them, `worker` is one."""

NURSERY = "PRIVINF_NURSERY"
"""An environment variable: the descriptor on which the front talks to a nursery that it has started."""
