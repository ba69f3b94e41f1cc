"""A random Llama of 1.2 GB for the proof: ``python make_model.py DIR``, beside ``tiny_models.py``.

Run on the GPU host, by the Python with PyTorch and transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Only on that host, which no type checker sees.
import torch  # type: ignore[import-not-found,unused-ignore]
from tiny_models import make_tokenizer  # type: ignore[import-not-found,unused-ignore]
from transformers import (  # type: ignore[import-not-found,unused-ignore]
    LlamaConfig,
    LlamaForCausalLM,
)


def main(directory: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,  # of 128: what FlashAttention 3 has kernels for
        num_key_value_heads=8,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
