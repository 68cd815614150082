"""ClusterFusion: decode GPT-NeoX models (Pythia and relatives) at the speed of memory.

>>> import clusterfusion
>>> engine = clusterfusion.Engine("models/demo")
>>> for event in engine.stream("It was a dark and stormy night"):
...     print(event.text, end="", flush=True)
"""

from clusterfusion import _native
from clusterfusion.engine import Engine, GenerateOptions, Stream
from clusterfusion.results import (
    EngineInfo,
    Event,
    FinishReason,
    Generation,
    ModelConfig,
    Perplexity,
    Score,
    Statistics,
    TokenLogprobs,
)
from clusterfusion.tokenizer import Tokenizer

__version__: str = _native.version()

__all__ = [
    "Engine",
    "EngineInfo",
    "Event",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "ModelConfig",
    "Perplexity",
    "Score",
    "Statistics",
    "Stream",
    "TokenLogprobs",
    "Tokenizer",
    "__version__",
]
