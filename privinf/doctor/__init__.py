"""What may be wrong with an installation, a machine or a deployment."""
