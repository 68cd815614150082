"""Time what PyTorch and transformers make of a decode step and of a prompt on a GPU.

Random weights in a Pythia or Llama shape, batch 1, greedy, the whole step: embedding, layers, LM
head, choice of the token. Of Llama and its relatives only transformers' own rivals are timed. Times
are wall-clock times of several steps without a wait between them. Prints one JSON object; a rival
that does not run is in it with its error. Needs torch, transformers and an NVIDIA GPU.

    python benchmarks/peers/torch_cuda.py --shape pythia-2.8b --contexts 16,128,1024,2047
    python benchmarks/peers/torch_cuda.py --shape llama-3.1-8b --dtype bfloat16 \
        --contexts 128,8192 --rivals static
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))

from checkpoints import PYTHIA_SHAPES, transformers_config

# hidden, layers, heads, vocabulary, heads of keys and values, their size, intermediate, tied
# embeddings: as benchmarks/cuda/random_model.hpp has them.
LLAMA_SHAPES = {
    "llama-3.2-1b": (LlamaConfig, 2048, 16, 32, 128256, 8, 64, 8192, True),
    "llama-3.1-8b": (LlamaConfig, 4096, 32, 32, 128256, 8, 128, 14336, False),
    "mistral-7b": (MistralConfig, 4096, 32, 32, 32768, 8, 128, 14336, False),
    "qwen3-0.6b": (Qwen3Config, 1024, 28, 16, 151936, 8, 128, 3072, True),
    "qwen3-1.7b": (Qwen3Config, 2048, 28, 16, 151936, 8, 128, 6144, True),
    "qwen3-8b": (Qwen3Config, 4096, 36, 32, 151936, 8, 128, 12288, False),
}

PYTHIA_RIVALS = ("graph", "compiled-graph")

# Steps between two readings of the clock, and readings.
GRAPH_STEPS, GRAPH_ROUNDS = 20, 9
EAGER_STEPS, EAGER_ROUNDS = 4, 5
COMPILED_STEPS, COMPILED_ROUNDS = 10, 7
PREFILL_ROUNDS = 9


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""

    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",") if item]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="pythia-2.8b", choices=[*PYTHIA_SHAPES, *LLAMA_SHAPES])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--contexts", type=numbers, default=[16, 128, 1024, 2047])
    parser.add_argument("--prompts", type=numbers, default=[128, 512, 2048])
    parser.add_argument("--rivals", help="which ones, and prefill; all of the shape's unless given")
    parser.add_argument("--limit", type=int, default=60, help="seconds for each rival")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    arguments = parser.parse_args()
    others = PYTHIA_RIVALS if arguments.shape in LLAMA_SHAPES else ()
    if arguments.rivals is None:
        arguments.rivals = ",".join(rival for rival in RIVALS if rival not in others)
    of_pythia = [rival for rival in arguments.rivals.split(",") if rival in others]
    if of_pythia:
        parser.error(f"{', '.join(of_pythia)}: of Pythia's shapes alone, found {arguments.shape}")
    return arguments


def llama_config(shape: str) -> LlamaConfig | MistralConfig | Qwen3Config:
    """Configuration of one of LLAMA_SHAPES."""
    kind, hidden, layers, heads, vocab, kv_heads, head_dim, inner, tied = LLAMA_SHAPES[shape]
    return kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=0,
    )


def make_model(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """Transformers' model with its own random initialization, made where it is to run."""
    torch.manual_seed(0)
    config = llama_config(shape) if shape in LLAMA_SHAPES else transformers_config(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return model.eval()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and extremes in milliseconds."""
    milliseconds = [1e3 * value for value in seconds]
    return {
        "ms_per_token": statistics.median(milliseconds),
        "low": min(milliseconds),
        "high": max(milliseconds),
    }


def time_steps(step: Callable[[], object], steps: int, rounds: int) -> list[float]:
    """Seconds a step in each round, from the host to the end of the work; one round warms up."""
    seconds = []
    for _ in range(1 + rounds):
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        seconds.append((time.perf_counter() - begin) / steps)
    return seconds[1:]


def prompt_of(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Token ids [1, count]."""
    return (torch.arange(count, device=model.device) * 7919 % model.config.vocab_size)[None]


Norm = tuple[torch.Tensor, torch.Tensor, float]  # weight, bias, epsilon
Linear = tuple[torch.Tensor, torch.Tensor]  # weight, bias


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, (x.shape[-1],), *norm)


def before_attention(
    x: torch.Tensor, norm: Norm, linear: Linear, heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Query, key and value with their rotation: [heads, 3, head_dim]."""
    qkv = F.linear(layer_norm(x, norm), *linear).view(heads, 3, -1)
    rotary_dim = cos.shape[-1]
    turned, rest = qkv[:, :2, :rotary_dim], qkv[:, :2, rotary_dim:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((torch.cat((turned, rest), dim=-1), qkv[:, 2:]), dim=1)


def after_attention(
    x: torch.Tensor, attended: torch.Tensor, out: Linear, norm: Norm, up: Linear, down: Linear
) -> torch.Tensor:
    """Output projection and MLP, both added to x."""
    inner = F.gelu(F.linear(layer_norm(x, norm), *up))
    return x + F.linear(attended, *out) + F.linear(inner, *down)


class FunctionalDecoder:
    """The decode step in PyTorch's own functions, with few kernels.

    The context is fixed, so that a CUDA graph can hold the step: what a graph for each context, or
    one with masks, costs beyond that is not counted.
    """

    def __init__(self, model: GPTNeoXForCausalLM, context: int, compiled: bool) -> None:
        config = model.config
        self.context, self.heads = context, config.num_attention_heads
        self.model, self.lm_head = model.gpt_neox, model.lm_head.weight
        # Compiled once for all layers and contexts; attention stays with PyTorch's own kernels.
        compile_it = torch.compile(dynamic=False, fullgraph=True) if compiled else lambda f: f
        self.before, self.after = compile_it(before_attention), compile_it(after_attention)
        position = torch.tensor([[context]], device=model.device)
        half = torch.zeros((), dtype=torch.float16, device=model.device)
        self.cos, self.sin = (part[0] for part in self.model.rotary_emb(half, position))
        shape = (2, self.heads, context + 1, config.hidden_size // self.heads)
        self.caches = [
            torch.randn(shape, device=model.device, dtype=torch.float16) for _ in self.model.layers
        ]
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)

    def attention(self, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Attention over the cache, whose last position takes this step's key and value."""
        cache[:, :, self.context] = qkv[:, 1:].transpose(0, 1)
        keys, values = cache[0][None], cache[1][None]
        attended = F.scaled_dot_product_attention(qkv[None, :, :1], keys, values)
        return attended.reshape(1, -1)

    def step(self) -> None:
        """One token, from `token` to `token`."""
        x = F.embedding(self.token, self.model.embed_in.weight)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            attention, mlp = layer.attention, layer.mlp
            qkv = self.before(
                x,
                norm_of(layer.input_layernorm),
                linear_of(attention.query_key_value),
                self.heads,
                self.cos,
                self.sin,
            )
            x = self.after(
                x,
                self.attention(qkv, cache),
                linear_of(attention.dense),
                norm_of(layer.post_attention_layernorm),
                linear_of(mlp.dense_h_to_4h),
                linear_of(mlp.dense_4h_to_h),
            )
        logits = F.linear(layer_norm(x, norm_of(self.model.final_layer_norm)), self.lm_head)
        torch.argmax(logits, dim=-1, out=self.token)


def norm_of(module: torch.nn.LayerNorm) -> Norm:
    """What F.layer_norm takes."""
    return module.weight, module.bias, module.eps


def linear_of(module: torch.nn.Linear) -> Linear:
    """What F.linear takes."""
    return module.weight, module.bias


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_functional(model: GPTNeoXForCausalLM, contexts: list[int], compiled: bool) -> list[dict]:
    """Functional layers in a CUDA graph; `compiled` fuses what lies between the products."""
    results = []
    for context in contexts:
        decoder = FunctionalDecoder(model, context, compiled)
        step = capture(decoder.step) if model.device.type == "cuda" else decoder.step
        seconds = time_steps(step, GRAPH_STEPS, GRAPH_ROUNDS)
        results.append({"context": context, **summary(seconds)})
    return results


def time_transformers(model: PreTrainedModel, contexts: list[int]) -> list[dict]:
    """Eager steps with transformers' growing cache; the context grows by one a step."""
    results = []
    for context in contexts:
        output = model(prompt_of(model, context), use_cache=True, logits_to_keep=1)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

        def step(cache=cache, token=token) -> None:
            output = model(token, past_key_values=cache, use_cache=True)
            token.copy_(output.logits[:, -1:].argmax(-1))

        seconds = time_steps(step, EAGER_STEPS, EAGER_ROUNDS)
        results.append({"context": context, **summary(seconds)})
    return results


def time_static_cache(model: PreTrainedModel, contexts: list[int]) -> list[dict]:
    """A static cache and torch.compile in the mode reduce-overhead, which uses CUDA graphs.

    Each step attends to all of the cache's positions, whatever the context.
    """
    longest = max(contexts) + COMPILED_STEPS * (COMPILED_ROUNDS + 1) + 1
    cache = StaticCache(config=model.config, max_cache_len=longest)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    results = []
    for context in contexts:
        cache.reset()
        prompt = prompt_of(model, context)
        output = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        position = torch.tensor([[context]], device=model.device)

        def step(token=token, position=position) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            output = compiled(token, past_key_values=cache, position_ids=position, use_cache=True)
            token.copy_(output.logits[:, -1:].argmax(-1))
            position.add_(1)

        seconds = time_steps(step, COMPILED_STEPS, COMPILED_ROUNDS)
        results.append({"context": context, **summary(seconds)})
    return results


def time_prefill(model: PreTrainedModel, counts: list[int]) -> list[dict]:
    """Prompts by transformers, logits at the last position only."""
    results = []
    for count in counts:
        prompt = prompt_of(model, count)

        def step(prompt=prompt) -> None:
            model(prompt, use_cache=True, logits_to_keep=1)

        times = summary(time_steps(step, 1, PREFILL_ROUNDS))
        results.append({"tokens": count, "ms": times.pop("ms_per_token"), **times})
    return results


RIVALS: dict[str, tuple[str, Callable[[PreTrainedModel, list[int]], list[dict]]]] = {
    "graph": (
        "PyTorch functional layers, CUDA graph",
        lambda model, contexts: time_functional(model, contexts, compiled=False),
    ),
    "eager": ("transformers, eager", time_transformers),
    "prefill": ("transformers, prefill", time_prefill),
    "compiled-graph": (
        "PyTorch functional layers, torch.compile, CUDA graph",
        lambda model, contexts: time_functional(model, contexts, compiled=True),
    ),
    "static": ("transformers, static cache, torch.compile", time_static_cache),
}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what runs longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(
    name: str, time_it: Callable[[], list[dict]], limit: int
) -> tuple[list[dict], dict[str, str]]:
    """What a rival came to, or its error."""
    begin = time.perf_counter()
    try:
        with time_limit(limit), torch.inference_mode():
            results, error = time_it(), {}
    except Exception as failure:
        lines = str(failure).splitlines() or [""]
        results, error = [], {"error": f"{type(failure).__name__}: {lines[0]}"}
    print(f"{name}: {time.perf_counter() - begin:.1f} s {error or results}", file=sys.stderr)
    return results, error


def main() -> None:
    """Measure all rivals and print the result."""
    arguments = parse_arguments()
    begin = time.perf_counter()
    model = make_model(arguments.shape, arguments.dtype, arguments.device)
    synchronize()
    print(f"model: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    cuda = arguments.device == "cuda"
    report = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "rivals": [],
        "prefill": [],
    }
    for key in arguments.rivals.split(","):
        name, time_rival = RIVALS[key]
        sizes = arguments.prompts if key == "prefill" else arguments.contexts
        results, error = run(name, lambda f=time_rival, s=sizes: f(model, s), arguments.limit)
        if key == "prefill":
            report["prefill"] = [{"name": name, **row} for row in results] or [error]
        else:
            report["rivals"].append({"name": name, "contexts": results} | error)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
