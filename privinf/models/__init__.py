"""Model families, a file each; found by the `model_type` of a configuration."""
