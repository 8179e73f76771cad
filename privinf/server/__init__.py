"""The server: owns a model."""
