"""Which release this is, and which session protocol it speaks."""

VERSION = "0.1.0"
PROTOCOL = 8
