"""A service in several processes: `front` listens and watches, `nursery` loads what they share and forks them, `worker` is one."""
