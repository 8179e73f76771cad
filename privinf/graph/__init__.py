"""What a lowered graph is made of, whatever its operators: nodes, the private values that run through them, their plans, their rules."""
