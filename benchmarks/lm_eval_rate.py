"""What lm-evaluation-harness's model of this package reaches of the engine's own rate.

    python benchmarks/lm_eval_rate.py FOLDER [--device cuda] [--texts 1024] [--tokens 64]

Scores the same random texts three ways, in turns: by `Engine.score()` of their tokens, by
`Engine.loglikelihood()`, which also tells whether a text is the greedy one, and by the requests of
a task, whose texts the model has to encode. Prints one JSON object: tokens a second of each, the
median of the rounds with the least and the most, and their share of the first way's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

from clusterfusion.lm_eval import ClusterFusionLM
from lm_eval.api.instance import Instance


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of a text, about")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = ClusterFusionLM(options.folder, device=options.device, batch_size=options.batch_size)
    engine = model.engine
    requests = make_requests(model, options.texts, options.tokens)
    pairs = [model._encode_pair(*request.args) for request in requests]
    contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ways: dict[str, Callable[[], object]] = {
        "score": lambda: engine.score([[*pair[0], *pair[1]] for pair in pairs]),
        "loglikelihood": lambda: engine.loglikelihood(contexts, continuations),
        "lm_eval": lambda: model.loglikelihood(requests, disable_tqdm=True),
    }
    tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            rates[name].append(tokens / (time.perf_counter() - began))
    rows = {name: sorted(values[1:]) for name, values in rates.items()}
    base = statistics.median(rows["score"])
    print(
        json.dumps(
            {
                "device": engine.info.device_description,
                "model": engine.info.path,
                "texts": len(requests),
                "tokens": tokens,
                "batch_size": model.batch_size,
                "tokens_per_second": {
                    name: {
                        "median": round(statistics.median(values)),
                        "low": round(values[0]),
                        "high": round(values[-1]),
                        "of_score": round(statistics.median(values) / base, 3),
                    }
                    for name, values in rows.items()
                },
            },
            indent=1,
        )
    )


def make_requests(model: ClusterFusionLM, texts: int, tokens: int) -> list[Instance]:
    """Pairs of texts of random tokens, half of which are the context."""
    rng = random.Random(1)
    vocab = model.engine.tokenizer.vocab_size

    def text(count: int) -> str:
        return model.engine.decode([rng.randrange(vocab) for _ in range(count)])

    pairs = [(text(tokens // 2), text(tokens - tokens // 2)) for _ in range(texts)]
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
    ]


if __name__ == "__main__":
    main()
