"""Training and looking inside: corpora, the trainer, entropy, causal traces, which FFNs to remove, pictures and pages of it."""
