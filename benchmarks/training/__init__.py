"""The ladder trained with equal budgets, the speed of training, and ordinary inference: what docs/softmax-only.md shows."""
