"""Make tiny random Llama models that a real vLLM serves.

``python tiny_models.py DIR '{"name": seed, …}'``, run with the Python of the vLLM environment
(vllm.py), which has transformers and torch.
"""

from __future__ import annotations

import json
import pathlib
import sys

# Only in the vLLM environment, which no type checker sees.
import torch  # type: ignore[import-not-found,unused-ignore]
from tokenizers import (  # type: ignore[import-not-found,unused-ignore]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import (  # type: ignore[import-not-found,unused-ignore]
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no unknown token
    )
    line = "user: the quick brown fox jumps over the lazy dog\nassistant: many models, few GPUs\n"
    tokenizer.train_from_iterator([line], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def make_model(directory: pathlib.Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Wider than the default 0.02: the answers of two seeds then differ at the first token.
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in pathlib.Path(directory).iterdir():
        file.chmod(0o644)  # safetensors writes 0600; engines have a user of their own


def main() -> None:
    directory = pathlib.Path(sys.argv[1])
    for name, seed in json.loads(sys.argv[2]).items():
        make_model(directory / name, seed)


if __name__ == "__main__":
    main()
