"""generate.py FOLDER PROMPT: stream the continuation of a prompt."""

import sys

import clusterfusion

if len(sys.argv) != 3:
    print(f"usage: {__doc__}", file=sys.stderr)
    sys.exit(2)
folder, prompt = sys.argv[1:]
engine = clusterfusion.Engine(folder)
stream = engine.stream(prompt, max_new_tokens=100, temperature=0.8, top_p=0.95, seed=1)
for event in stream:
    print(event.text, end="", flush=True)

(result,) = stream.results
print(f"\n{result.statistics.tokens_per_second:.1f} tokens/s", file=sys.stderr)
