"""Llama, Mistral, Qwen2 and Qwen3 in float64, in plain NumPy: the oracle of test_llama_family.py.

What reference_model.py is for GPT-NeoX. Shares no code with the engine; itself checked against
recordings of `transformers` there. Formulas: transformers/models/llama, modeling_rope_utils.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from reference_model import ACTIVATIONS, read_weights


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the rotation, in either spelling."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default", **rope}


def yarn_ramp(dim: int, rope: dict[str, Any], original: float) -> np.ndarray:
    """Of each pair the share that is slowed down."""

    def pair(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast", 32)), pair(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def rope_frequencies(config: dict[str, Any], head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and what cosines and sines are multiplied by."""
    rope = rope_of(config)
    plain = float(rope["rope_theta"]) ** (-np.arange(0, head_dim, 2) / head_dim)
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "linear":
        return plain / factor, 1.0
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        lengths = 2 * np.pi / plain
        kept = np.clip((original / lengths - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1)
        slowed = yarn_ramp(head_dim, rope, original)
        frequencies = plain * (1 - slowed) + plain / factor * slowed
        return frequencies, rope.get("attention_factor") or attention
    assert kind == "default", kind
    return plain, 1.0


class ReferenceLlama:
    """A checkpoint folder with its weights in float64."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        weights = read_weights(folder)
        self.weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        self.num_heads = self.config["num_attention_heads"]
        self.num_kv_heads = self.config["num_key_value_heads"]
        shared_out = self.config["hidden_size"] // self.num_heads
        missing = 128 if self.config["model_type"] == "qwen3" else shared_out
        self.head_dim = self.config.get("head_dim", missing) or shared_out
        self.frequencies, self.rope_factor = rope_frequencies(self.config, self.head_dim)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[name]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of [heads, positions, head_dim]."""
        angles = np.arange(x.shape[1])[:, None] * self.frequencies
        cos, sin = np.cos(angles) * self.rope_factor, np.sin(angles) * self.rope_factor
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def project(self, x: np.ndarray, layer: str, name: str) -> np.ndarray:
        """Queries, keys or values, [heads, positions, head_dim]."""
        y = self.linear(x, f"{layer}.self_attn.{name}_proj")
        y = y.reshape(x.shape[0], -1, self.head_dim).transpose(1, 0, 2)
        norm = f"{layer}.self_attn.{name}_norm.weight"
        return self.norm(y, norm) if norm in self.weights else y

    def heads(self, x: np.ndarray, layer: str) -> np.ndarray:
        """What attention's heads give, [positions, heads * head_dim]."""
        positions, group = x.shape[0], self.num_heads // self.num_kv_heads
        query = self.rotate(self.project(x, layer, "q"))
        key = np.repeat(self.rotate(self.project(x, layer, "k")), group, axis=0)
        value = np.repeat(self.project(x, layer, "v"), group, axis=0)
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(self.head_dim)
        scores[:, ~np.tri(positions, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(positions, -1)

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        normed = self.norm(x, f"{layer}.input_layernorm.weight")
        return self.linear(self.heads(normed, layer), f"{layer}.self_attn.o_proj")

    def mlp(self, x: np.ndarray, layer: str) -> np.ndarray:
        normed = self.norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = ACTIVATIONS[self.config["hidden_act"]](self.linear(normed, f"{layer}.mlp.gate_proj"))
        return self.linear(
            gate * self.linear(normed, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )

    def hidden_states(self, tokens: np.ndarray | list[int]) -> list[np.ndarray]:
        """Transformers' tuple: the residual stream before each layer, then the normalised one."""
        x = self.weights["embed_tokens.weight"][np.asarray(tokens)]
        states = [x]
        for index in range(self.config["num_hidden_layers"]):
            x = x + self.attention(x, f"layers.{index}")
            x = x + self.mlp(x, f"layers.{index}")
            states.append(x)
        states[-1] = self.norm(x, "norm.weight")
        return states

    def logits(self, tokens: np.ndarray | list[int]) -> np.ndarray:
        """Float64 logits [len(tokens), vocab_size]: row i predicts the token after tokens[i]."""
        head = "embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.hidden_states(tokens)[-1] @ self.weights[f"{head}.weight"].T
