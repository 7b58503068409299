"""Random models, small enough that a test may run hundreds of steps."""

from typing import Any

import torch


def llama(layers: int = 3, vocabulary: int = 61, seed: int = 0, **changes: Any) -> Any:
    """A Llama in fp32 without end tokens, whose text is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.3, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def prompts(vocabulary: int = 61, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 5, 7 and 9 tokens, padded with 0, and their mask."""
    ids = torch.randint(1, vocabulary, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    ids[mask == 0] = 0
    if side == "right":
        ids[:2], mask[:2] = (
            torch.stack([x[0].roll(-4), x[1].roll(-2)]) for x in (ids, mask)
        )  # fmt: skip
    return ids, mask
