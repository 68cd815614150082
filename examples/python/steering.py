"""steering.py FOLDER [PLOT.svg]: turn a model's mind to the sea, and plot by how much.

Activation addition (Turner et al., https://arxiv.org/abs/2308.10248): the residual stream of a
prompt about the sea less that of a prompt about a house, before one layer, is added at every
position while other texts are read and written. Words of the sea become likelier, and with a
negative scale less likely; words that have to do with neither stay about as they are.
"""

import sys
from html import escape

import clusterfusion
import numpy as np

LAYER = 4
TOWARDS = "The ship sailed over the sea, and the captain and his sailors"
AWAY = "The house stood in the garden, and the lady and her servants"
SCALES = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
WORDS = {
    "the sea": ["ship", "sea", "captain", "boat", "deck", "shore", "wind", "water"],
    "the house": ["house", "room", "garden", "door", "lady", "servant", "window", "mother"],
    "neither": ["time", "day", "man", "world", "truth", "hand", "word", "year"],
}
CONTEXTS = [
    "They talked for a long time about the",
    "He could not forget the",
    "In the morning she saw the",
    "There was nothing left but the",
    "At last he came to the",
    "Nobody had spoken of the",
]


def steering_vector(engine: clusterfusion.Engine) -> np.ndarray:
    """Returns the difference of the two prompts' residual streams, each at its mean position."""
    name = f"blocks.{LAYER}.hook_resid_pre"
    towards, away = (
        on_host(engine.hidden_states(prompt, at=name)[name]).mean(axis=0)
        for prompt in (TOWARDS, AWAY)
    )
    return towards - away


def on_host(array):
    """Returns an array of the CPU; one of a GPU by way of torch."""
    if isinstance(array, np.ndarray):
        return array
    import torch

    return torch.from_dlpack(array).cpu().numpy()


def probability(engine: clusterfusion.Engine, words: list[str]) -> float:
    """Returns how likely one of the words is to come next, on average over the contexts."""
    pairs = [(context, " " + word) for context in CONTEXTS for word in words]
    scores = engine.loglikelihood([c for c, _ in pairs], [w for _, w in pairs])
    return sum(np.exp(score.total) for score in scores) / len(CONTEXTS)


def measure(engine: clusterfusion.Engine, vector: np.ndarray) -> dict[str, list[float]]:
    """Returns the probability of each group of words at each scale."""
    results: dict[str, list[float]] = {topic: [] for topic in WORDS}
    for scale in SCALES:
        with engine.steer({LAYER: vector}, scale):
            for topic, words in WORDS.items():
                results[topic].append(probability(engine, words))
    return results


def draw(results: dict[str, list[float]]) -> str:
    """Returns a plot of the probabilities against the scale, as SVG."""
    width, height, left, top = 640, 360, 70, 40
    highest = max(map(max, results.values())) * 1.05

    def x(scale: float) -> float:
        return left + (scale - SCALES[0]) / (SCALES[-1] - SCALES[0]) * (width - left - 130)

    def y(value: float) -> float:
        return height - 50 - value / highest * (height - 50 - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">Probability of the next word, steered before '
        f"layer {LAYER}</text>",
    ]
    for scale in SCALES:
        parts.append(
            f'<line x1="{x(scale):.1f}" x2="{x(scale):.1f}" y1="{top}" y2="{y(0):.1f}" '
            f'stroke="#ddd"/><text x="{x(scale):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">'
            f"{scale:g}</text>"
        )
    for tick in np.linspace(0, highest, 5):
        parts.append(
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.1%}</text>'
        )
    for (topic, values), colour in zip(results.items(), ("#0b6", "#c40", "#777"), strict=True):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(SCALES, values, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{x(SCALES[-1]) + 8:.1f}" y="{y(values[-1]) + 4:.1f}" fill="{colour}">'
            f"words of {escape(topic)}</text>"
        )
    middle = (x(SCALES[0]) + x(SCALES[-1])) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{height - 10}" text-anchor="middle">scale</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measures, prints, and draws the plot if asked to."""
    if not 2 <= len(sys.argv) <= 3:
        print(f"usage: {__doc__.splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    engine = clusterfusion.Engine(sys.argv[1])
    vector = steering_vector(engine)
    results = measure(engine, vector)
    print("scale  " + "".join(f"{topic:>12}" for topic in results))
    for index, scale in enumerate(SCALES):
        print(f"{scale:5.1f}  " + "".join(f"{v[index]:12.2%}" for v in results.values()))
    for scale in (-1.5, 0.0, 1.5):
        with engine.steer({LAYER: vector}, scale):
            text = engine.generate(CONTEXTS[1], max_new_tokens=40, temperature=0.7, seed=3).text
        print(f"\nscale {scale:g}: {CONTEXTS[1]}{text}")
    if len(sys.argv) == 3:
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            file.write(draw(results))
        print(f"\nthe plot: {sys.argv[2]}")


if __name__ == "__main__":
    main()
