"""The model for lm-evaluation-harness: beside a float64 model by the rules of lm_eval's ``hf``, and
beside ``hf`` itself where torch and transformers are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from reference_model import ReferenceModel, log_softmax
from tokenizers import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm-eval")

from clusterfusion.lm_eval import ClusterFusionLM  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

LONGEST = 48
END = "<|endoftext|>"
WORDS = ["it", "was", "the", "best", "of", "times", "it", "was", "the", "worst", "of", "times"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("lm_eval"), max_positions=LONGEST, tokenizer="train", seed=3
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
        )
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle(folder) -> ReferenceModel:
    return ReferenceModel(folder)


@pytest.fixture(scope="module")
def model(folder) -> ClusterFusionLM:
    return ClusterFusionLM(pretrained=str(folder), device="cpu", batch_size=5)


@pytest.fixture(scope="module")
def hf(folder):
    for module in ("torch", "transformers", "accelerate"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from lm_eval.models.huggingface import HFLM

    # Its cache of logits (lm_eval 0.4.13) takes those of the wrong places where two requests of one
    # batch divide the same tokens at different places, as ("<|endoftext|>", "it was") and
    # ("<|endoftext|>it", " was") do.
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, logits_cache=False
    )


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def pairs() -> list[tuple[str, str]]:
    """Empty, short, and longer than the context; white space on either side; special tokens."""
    rng = np.random.default_rng(1)
    found = [("", "it was"), ("", END + "it was"), (END, "it was"), (END + "it", " was")]
    for _ in range(60):
        context = words(rng, int(rng.choice([1, 2, 5, 20, 60])))
        space = str(rng.choice(["", " ", "\n", " \t "]))
        tail = words(rng, int(rng.choice([1, 1, 1, 3, 8])))
        found.append((context + space, " " + tail))
        found.append((context + space, tail))
    return found


def sum_of_logprobs(oracle, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """hf: the input is (context + continuation)[-(length + 1):][:-1], its last logits count."""
    tokens = (context + continuation)[-(LONGEST + 1) :]
    logits = oracle.logits(tokens[:-1])[-len(continuation) :]
    logprobs = log_softmax(logits)[np.arange(len(continuation)), continuation]
    return logprobs.sum(), bool((logits.argmax(-1) == continuation).all())


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    end = tokenizer.token_to_id(END)
    if not context:
        tokens = tokenizer.encode(continuation, add_special_tokens=False).ids
        return (tokens[:1], tokens[1:]) if tokens[0] == end else ([end], tokens)
    stripped = context.rstrip()
    head = tokenizer.encode(stripped).ids
    return head, tokenizer.encode(context + continuation).ids[len(head) :]


def test_is_registered(model):
    assert get_model("clusterfusion") is ClusterFusionLM
    assert (model.max_length, model.batch_size, model.rank) == (LONGEST, 5, 0)


def test_loglikelihood(model, oracle, tokenizer):
    requests = pairs()
    results = model.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    lengths = set()
    for (context, continuation), (total, is_greedy) in zip(requests, results, strict=True):
        head, tail = encode_pair(tokenizer, context, continuation)
        lengths.add(len(head) + len(tail) > LONGEST + 1)
        exact = sum_of_logprobs(oracle, head, tail)
        assert total == pytest.approx(exact[0], abs=1e-4)
        assert is_greedy == exact[1]
        assert (type(total), type(is_greedy)) == (float, bool)
    assert lengths == {False, True}


def test_loglikelihood_of_greedy_text(model):
    prompt = "it was the best"
    tokens = model.engine.generate(prompt, max_new_tokens=3, ignore_eos=True).tokens
    wrong = [*tokens[:-1], (tokens[-1] + 1) % model.engine.config.vocab_size]
    head = model.engine.encode(prompt)
    results = model._loglikelihood_tokens(
        [(("", ""), head, tokens), (("", ""), head, wrong)], disable_tqdm=True
    )
    assert [is_greedy for _, is_greedy in results] == [True, False]


def test_loglikelihood_rolling(model, oracle, tokenizer):
    rng = np.random.default_rng(2)
    texts = ["it", "", END + "it was", *(words(rng, n) for n in (1, 5, 30, 60, 200))]
    results = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    end = tokenizer.token_to_id(END)
    for text, total in zip(texts, results, strict=True):
        tokens = tokenizer.encode(text).ids
        exact = 0.0
        for begin in range(0, len(tokens), LONGEST):
            part = tokens[begin : begin + LONGEST]
            # The last window is a full one, of which only the new tokens count.
            before = [end, *tokens][max(0, begin + len(part) + 1 - (LONGEST + 1)) : begin + 1]
            exact += sum_of_logprobs(oracle, before, part)[0]
        assert total == pytest.approx(exact, abs=1e-4)


def generate_requests() -> list[tuple[str, dict]]:
    rng = np.random.default_rng(4)
    kinds = [
        {"until": ["\n"], "max_gen_toks": 8},
        {"until": "e", "max_new_tokens": 12, "do_sample": False},
        {"until": ["e ", "t", END], "max_gen_toks": 12, "temperature": 0.0},
        {"until": [], "max_gen_toks": LONGEST - 1},
    ]
    return [
        (words(rng, int(rng.choice([1, 3, 10, 60]))) + str(rng.choice(["", " "])), kinds[i % 4])
        for i in range(24)
    ]


def test_generate_until(model, oracle, tokenizer):
    requests = generate_requests()
    results = model.generate_until(instances("generate_until", requests), disable_tqdm=True)
    end = tokenizer.token_to_id(END)
    for (context, arguments), text in zip(requests, results, strict=True):
        limit = arguments.get("max_gen_toks") or arguments["max_new_tokens"]
        until = arguments["until"]
        stops = [until] if isinstance(until, str) else until
        tokens = tokenizer.encode(context).ids[-(LONGEST - limit) :]
        new: list[int] = []
        while len(new) < limit and new[-1:] != [end]:
            new.append(int(oracle.logits(tokens + new)[-1].argmax()))
            if any(stop in tokenizer.decode(new) for stop in stops):
                break
        expected = tokenizer.decode(new)
        for stop in stops:
            expected = expected.split(stop)[0]
        assert text == expected


def test_sampled_texts_differ(model):
    arguments = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 10}
    requests = instances("generate_until", [("it was", arguments)] * 6)
    texts = model.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1


def test_equals_hf(model, hf):
    """Live, in float32."""
    assert hf.prefix_token_id == model.prefix_token_id
    assert hf.max_length == model.max_length
    requests = instances("loglikelihood", pairs())
    for ours, theirs in zip(
        model.loglikelihood(requests, disable_tqdm=True),
        hf.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    ):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
    rng = np.random.default_rng(2)
    requests = instances("loglikelihood_rolling", [(words(rng, n),) for n in (1, 5, 30, 60, 200)])
    assert model.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(
        hf.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-4, rel=1e-6
    )
    requests = instances("generate_until", generate_requests())
    assert model.generate_until(requests, disable_tqdm=True) == hf.generate_until(
        requests, disable_tqdm=True
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "bfloat16"}, ValueError, "dtype: expected auto or float"),
        ({"batch_size": "many"}, ValueError, "batch_size"),
        ({"device": "mps"}, ValueError, "device"),
        ({"mode": "quick"}, ValueError, "mode: expected 'latency' or 'throughput'"),
        ({"max_length": LONGEST + 1}, ValueError, "context must be in"),
        ({"pretrained": "/nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_refuses_wrong_arguments(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        ClusterFusionLM(**{"pretrained": str(folder), "device": "cpu", **arguments})


def test_mode(folder, model):
    """Of a GPU; on the CPU both are the same."""
    other = ClusterFusionLM(pretrained=str(folder), device="cpu", mode="throughput")
    requests = instances("generate_until", [("it was the", {"max_gen_toks": 8})])
    expected = model.generate_until(requests, disable_tqdm=True)
    assert other.generate_until(requests, disable_tqdm=True) == expected


def test_refuses_requests_without_room(model):
    long = instances("loglikelihood", [("it", " was" * (LONGEST + 1))])
    with pytest.raises(ValueError, match=f"1 to {LONGEST} tokens"):
        model.loglikelihood(long, disable_tqdm=True)
    request = instances("generate_until", [("it", {"max_gen_toks": LONGEST})])
    with pytest.raises(ValueError, match="max_gen_toks: expected less than"):
        model.generate_until(request, disable_tqdm=True)


def test_program(folder, tmp_path, model):
    """`python -m clusterfusion.lm_eval` on a local task of four questions."""
    docs = [
        {"question": "it was the", "choices": [" best", " worst", " times"], "answer": i % 3}
        for i in range(4)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
    )
    command = [
        *(sys.executable, "-m", "clusterfusion.lm_eval", "run", "--model", "clusterfusion"),
        *("--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "4"),
        *("--include_path", tmp_path, "--tasks", "local_choice", "--output_path", tmp_path / "out"),
    ]
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    requests = [("it was the", choice) for choice in docs[0]["choices"]]
    totals = [
        total
        for total, _ in model.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    ]
    best = int(np.argmax(totals))
    expected = sum(doc["answer"] == best for doc in docs) / len(docs)
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(expected)
    assert results["config"]["model"] == "clusterfusion"
