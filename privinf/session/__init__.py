"""What the parties share: handshake, messages, options, services, prepared queries and their marks."""
