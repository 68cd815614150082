"""Time decode and prefill of a GPT-NeoX checkpoint with transformers on the CPU.

Prints one JSON object: seconds of each greedy decode step with a KV cache, and of each prefill
whose logits are wanted at the last position only. Needs torch and transformers.

    python benchmarks/peers/transformers_cpu.py CHECKPOINT --dtype float32 --prompt 512
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
import transformers


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder with config.json and model.safetensors")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=16, help="decode steps")
    parser.add_argument("--context", type=int, default=16, help="positions before the first step")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prefill; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="prefills timed")
    return parser.parse_args()


def prompt_of(count: int, vocab: int) -> torch.Tensor:
    """Give the token ids that benchmarks/cpu/decode_bandwidth.cpp uses."""
    return (torch.arange(count) * 7919 % vocab)[None]


def time_decode(model: torch.nn.Module, context: int, steps: int) -> list[float]:
    """Time each greedy step after a short context."""
    result = model(prompt_of(context, model.config.vocab_size), use_cache=True)
    seconds = []
    for _ in range(steps):
        token = result.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        result = model(token, past_key_values=result.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def time_prefill(model: torch.nn.Module, count: int, repeats: int) -> list[float]:
    """Time prefills of `count` tokens; the first, untimed one warms up."""
    tokens = prompt_of(count, model.config.vocab_size)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(tokens, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    """Run the measurements that the command line asks for."""
    arguments = parse_arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype)
    ).eval()
    with torch.inference_mode():
        time_decode(model, arguments.context, 2)
        decode = time_decode(model, arguments.context, arguments.steps)
        prefill = []
        if arguments.prompt:
            prefill = time_prefill(model, arguments.prompt, arguments.repeats)
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
                "attention": model.config._attn_implementation,
                "dtype": arguments.dtype,
                "decode_seconds": decode,
                "prefill_seconds": prefill,
            }
        )
    )


if __name__ == "__main__":
    main()
