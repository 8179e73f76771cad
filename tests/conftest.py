"""Settings of all tests."""

from hypothesis import settings

# a busy machine is slow, and that is no failure
settings.register_profile("privinf", deadline=None)
settings.load_profile("privinf")
