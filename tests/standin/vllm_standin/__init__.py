"""A program that behaves as vLLM does wherever a supervisor or a proxy can see it."""
