"""The client's side as a local HTTP service: an OpenAI-compatible door, and a page that shows what each party sees."""
