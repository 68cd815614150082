"""GPT-NeoX in float64, in plain NumPy: the oracle that the engine is compared with.

It shares no code with the engine and is itself checked against recordings of `transformers`
(test_reference_model.py). Slow and short on purpose. Formulas: transformers/models/gpt_neox.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu_erf,
    "gelu_python": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
    "silu": silu,
    "swish": silu,
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0.0)),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "linear": lambda x: x,
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All floating-point tensors of a file, as float64."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__" or entry["dtype"] not in ("F16", "BF16", "F32"):
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], {"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by name without the prefix "gpt_neox."."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    weights: dict[str, np.ndarray] = {}
    for file in files:
        weights |= read_safetensors(folder / file)
    return {name.removeprefix("gpt_neox."): tensor for name, tensor in weights.items()}


class ReferenceModel:
    """A checkpoint folder with its weights in float64."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = read_weights(folder)
        self.num_heads = self.config["num_attention_heads"]
        self.head_dim = self.config["hidden_size"] // self.num_heads

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        normed = centred / np.sqrt(variance + self.config.get("layer_norm_eps", 1e-5))
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of [heads, positions, head_dim]; https://arxiv.org/abs/2104.09864."""
        rope = self.config.get("rope_parameters") or {}
        theta = rope.get("rope_theta", self.config.get("rotary_emb_base", 10000))
        pct = rope.get("partial_rotary_factor", self.config.get("rotary_pct", 0.25))
        dim = int(self.head_dim * pct)
        if dim == 0:
            return x
        frequencies = float(theta) ** (-np.arange(0, dim, 2) / dim)
        angles = np.arange(x.shape[1])[:, None] * frequencies
        half = angles.shape[1]  # an odd dim rotates dim + 1 values, as transformers does
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
        )

    def heads(self, x: np.ndarray, name: str) -> np.ndarray:
        """What attention's heads give, [positions, heads * head_dim]."""
        positions = x.shape[0]
        qkv = self.linear(x, f"{name}.query_key_value")
        qkv = qkv.reshape(positions, self.num_heads, 3 * self.head_dim).transpose(1, 0, 2)
        query, key, value = np.split(qkv, 3, axis=-1)
        query, key = self.rotate(query), self.rotate(key)
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(self.head_dim)
        scores[:, ~np.tri(positions, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(positions, -1)

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.linear(self.heads(x, name), f"{name}.dense")

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        activation = ACTIVATIONS[self.config["hidden_act"]]
        return self.linear(
            activation(self.linear(x, f"{name}.dense_h_to_4h")), f"{name}.dense_4h_to_h"
        )

    def layer(self, x: np.ndarray, name: str) -> np.ndarray:
        after = x + self.attention(
            self.layer_norm(x, f"{name}.input_layernorm"), f"{name}.attention"
        )
        mlp_input = x if self.config.get("use_parallel_residual", True) else after
        normed = self.layer_norm(mlp_input, f"{name}.post_attention_layernorm")
        return after + self.mlp(normed, f"{name}.mlp")

    def logits(self, tokens: np.ndarray | list[int]) -> np.ndarray:
        """Float64 logits [len(tokens), vocab_size]: row i predicts the token after tokens[i]."""
        x = self.weights["embed_in.weight"][np.asarray(tokens)]
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(x, f"layers.{index}")
        x = self.layer_norm(x, "final_layer_norm")
        if self.config.get("tie_word_embeddings", False):
            return x @ self.weights["embed_in.weight"].T
        head = "embed_out.weight" if "embed_out.weight" in self.weights else "lm_head.weight"
        return x @ self.weights[head].T

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """The most likely continuation, and by how much each token's logit beats the next one's."""
        tokens, margins = list(prompt), []
        for _ in range(count):
            last = self.logits(tokens)[-1]
            second, first = np.partition(last, -2)[-2:]
            tokens.append(int(last.argmax()))
            margins.append(float(first - second))
        return tokens[len(prompt) :], margins


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """L2 norm of the difference over the L2 norm of the reference."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))
