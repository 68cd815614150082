"""decoder_layer.py FOLDER PROMPT: decode with a transformers model, each layer in one call.

Needs torch and transformers: python -m pip install torch transformers
"""

import sys

import clusterfusion

try:
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"{error}\n{__doc__}")

if len(sys.argv) != 3:
    print(f"usage: {__doc__}", file=sys.stderr)
    sys.exit(2)
folder, prompt = sys.argv[1:]
model = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float16)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
neox, config = model.gpt_neox, model.config
rows = 256  # the longest context
caches = [torch.zeros(2, rows, config.hidden_size, dtype=torch.float16) for _ in neox.layers]


def step(token: int, position: int) -> int:
    """Decode one token: the likeliest next one."""
    hidden = neox.embed_in(torch.tensor([token]))
    cos, sin = neox.rotary_emb(hidden.float(), torch.tensor([[position]]))
    for layer, (k_cache, v_cache) in zip(neox.layers, caches, strict=True):
        ln, post_ln = layer.input_layernorm, layer.post_attention_layernorm
        qkv, dense = layer.attention.query_key_value, layer.attention.dense
        up, down = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
        hidden, _, _ = clusterfusion.ops.decoder_layer(
            *(hidden, qkv.weight, qkv.bias, dense.weight, dense.bias, k_cache, v_cache),
            *(ln.weight, ln.bias, cos, sin, post_ln.weight, post_ln.bias),
            *(up.weight, up.bias, down.weight, down.bias, position),
            num_heads=config.num_attention_heads,
        )
    return int(model.get_output_embeddings()(neox.final_layer_norm(hidden)).argmax())


tokens = tokenizer(prompt).input_ids
with torch.inference_mode():
    for position in range(len(tokens) + 50):
        token = step(tokens[position], position)
        if position + 1 == len(tokens):
            tokens.append(token)
print(tokenizer.decode(tokens))
