"""ClusterFusion: decode GPT-NeoX models (Pythia and relatives) at the speed of memory.

>>> import clusterfusion
>>> engine = clusterfusion.Engine("models/demo")
>>> for event in engine.stream("It was a dark and stormy night"):
...     print(event.text, end="", flush=True)
"""

from clusterfusion import _native, hub, ops
from clusterfusion.engine import Engine, GenerateOptions, Stream
from clusterfusion.pythia import (
    pythia_2b8_attention_only,
    pythia_2b8_create_graph_context,
    pythia_2b8_decoder_layer,
    pythia_2b8_decoder_layer_split,
    pythia_2b8_destroy_graph_context,
    pythia_2b8_graph_decode_step,
    pythia_2b8_mlp_only,
    pythia_6b9_attention_only,
    pythia_6b9_create_graph_context,
    pythia_6b9_decoder_layer,
    pythia_6b9_decoder_layer_split,
    pythia_6b9_destroy_graph_context,
    pythia_6b9_graph_decode_step,
    pythia_6b9_mlp_only,
)
from clusterfusion.results import (
    EngineInfo,
    Event,
    FinishReason,
    Generation,
    Loglikelihood,
    ModelConfig,
    Perplexity,
    Score,
    ServingStatistics,
    Statistics,
    TokenLogprobs,
)
from clusterfusion.tokenizer import Tokenizer
from clusterfusion.transformers_models import from_transformers, patch, unpatch

__version__: str = _native.version()

__all__ = [
    "Engine",
    "EngineInfo",
    "Event",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "Loglikelihood",
    "ModelConfig",
    "Perplexity",
    "Score",
    "ServingStatistics",
    "Statistics",
    "Stream",
    "TokenLogprobs",
    "Tokenizer",
    "__version__",
    "from_transformers",
    "hub",
    "ops",
    "patch",
    "pythia_2b8_attention_only",
    "pythia_2b8_create_graph_context",
    "pythia_2b8_decoder_layer",
    "pythia_2b8_decoder_layer_split",
    "pythia_2b8_destroy_graph_context",
    "pythia_2b8_graph_decode_step",
    "pythia_2b8_mlp_only",
    "pythia_6b9_attention_only",
    "pythia_6b9_create_graph_context",
    "pythia_6b9_decoder_layer",
    "pythia_6b9_decoder_layer_split",
    "pythia_6b9_destroy_graph_context",
    "pythia_6b9_graph_decode_step",
    "pythia_6b9_mlp_only",
    "unpatch",
]
