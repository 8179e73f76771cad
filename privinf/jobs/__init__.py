"""Jobs of many prompts: a file of requests in, a file of replies out, stopped and gone on with at any moment."""
