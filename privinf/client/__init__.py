"""The client: owns a prompt, alone learns the answer."""
