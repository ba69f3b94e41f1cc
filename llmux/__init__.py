"""llmux: many vLLM models, few GPUs, one OpenAI endpoint."""

__version__ = "0.1.0"
