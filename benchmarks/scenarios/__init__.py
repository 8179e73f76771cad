"""The scenarios, one file each: a function that adds what it measures to a `Run`."""
