"""A random Llama for the proof: ``python make_model.py DIR [8b]``, beside ``tiny_models.py``.

1.2 GB, or with ``8b`` 14 GB in Llama 3's shapes (but for its vocabulary), made on the GPU. Run on
the GPU host, by the Python with PyTorch and transformers.
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

SMALL = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,  # of 128: what FlashAttention 3 has kernels for
    "num_key_value_heads": 8,
    "initializer_range": 0.1,
}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "initializer_range": 0.05,
}


def main(directory: Path, *, large: bool) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(LARGE if large else SMALL),
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if large else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), large="8b" in sys.argv[2:])
