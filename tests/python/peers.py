"""The same checkpoints in `transformers`, for recordings and for live comparison.

Importing this needs torch and transformers; tests do it through pytest.importorskip.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference_llama import rope_frequencies
from transformers.models.gpt_neox import modeling_gpt_neox

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Float64Rotary(torch.nn.Module):
    """Rotary angles in float64: transformers rounds them to float32 even in a float64 model."""

    def __init__(self, original: modeling_gpt_neox.GPTNeoXRotaryEmbedding):
        super().__init__()
        config = original.config
        rope = config.rope_parameters
        head_dim = config.hidden_size // config.num_attention_heads
        dim = int(head_dim * rope["partial_rotary_factor"])
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1)
        self.frequencies = rope["rope_theta"] ** -exponents

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class Float64LlamaRotary(torch.nn.Module):
    """The same for Llama and its relatives, with frequencies that are compared with their own."""

    def __init__(self, original: Any):
        super().__init__()
        config = original.config.to_dict()
        head_dim = 2 * len(original.inv_freq)
        frequencies, self.factor = rope_frequencies(config, head_dim)
        np.testing.assert_allclose(original.inv_freq.float().numpy(), frequencies, rtol=2e-6)
        np.testing.assert_allclose(original.attention_scaling, self.factor, rtol=1e-12)
        self.frequencies = torch.from_numpy(frequencies)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.factor, angles.sin() * self.factor


class Float64RMSNorm(torch.nn.Module):
    """PyTorch's own: that of transformers rounds to float32 even in a float64 model."""

    def __init__(self, original: Any):
        super().__init__()
        self.weight, self.eps = original.weight, original.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def widen_to_float64(model: transformers.PreTrainedModel) -> None:
    """Takes the float32 out of a model that was loaded in float64."""
    base = model.base_model
    if isinstance(base.rotary_emb, modeling_gpt_neox.GPTNeoXRotaryEmbedding):
        base.rotary_emb = Float64Rotary(base.rotary_emb)
        return
    base.rotary_emb = Float64LlamaRotary(base.rotary_emb)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Float64RMSNorm(child))


def load_transformers(
    folder: Path | str, dtype: str, attention: str = "sdpa"
) -> transformers.PreTrainedModel:
    """The checkpoint as a transformers model that computes in `dtype`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation=attention
    )
    if dtype == "float64":
        widen_to_float64(model)
    return model.eval()


def transformers_logits(
    folder: Path | str, tokens: np.ndarray | list[int], dtype: str, attention: str = "sdpa"
) -> np.ndarray:
    """Logits of transformers at every position, computed in `dtype`, returned as float64."""
    model = load_transformers(folder, dtype, attention)
    with torch.inference_mode():
        logits = model(torch.tensor(np.asarray(tokens, np.int64)[None])).logits
    return logits[0].double().numpy()


def transformers_greedy(
    model: transformers.PreTrainedModel, prompts: np.ndarray | list[list[int]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuations of prompts of one length, by transformers with its KV cache.

    Never stops at an end token. Also returns by how much each token's logit beats the next one's.
    """
    step = torch.tensor(np.asarray(prompts, np.int64))
    cache, tokens, margins = None, [], []
    with torch.inference_mode():
        for _ in range(count):
            output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            best = output.logits[:, -1].double().topk(2)
            tokens.append(best.indices[:, 0].numpy())
            margins.append((best.values[:, 0] - best.values[:, 1]).numpy())
            step = best.indices[:, :1]
    return np.stack(tokens, axis=1), np.stack(margins, axis=1)


def transformers_perplexity(
    model: transformers.PreTrainedModel, tokens: np.ndarray, context: int, stride: int
) -> dict[str, float]:
    """Sliding-window perplexity: https://huggingface.co/docs/transformers/perplexity.

    "perplexity" weighs each scored token alike. "documented" is the sum as that page writes it,
    which takes a window's mean over trg_len tokens times trg_len - 1.
    """
    total = documented = 0.0
    scored = documented_tokens = previous_end = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        target = end - previous_end
        window = torch.tensor(tokens[None, begin:end].astype(np.int64))
        labels = window.clone()
        labels[:, :-target] = -100
        with torch.inference_mode():
            loss = float(model(window, labels=labels).loss)
        count = int((labels[:, 1:] != -100).sum())
        if count > 0:
            total += loss * count
            scored += count
            documented += loss * (target - 1)
            documented_tokens += target - 1
        previous_end = end
        if end == len(tokens):
            break
    return {
        "perplexity": math.exp(total / scored),
        "documented": math.exp(documented / documented_tokens),
    }


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
