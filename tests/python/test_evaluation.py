"""What lm-evaluation-harness asks for, as an engine takes it; needs no lm_eval."""

import json

import pytest
from checkpoints import write_random_checkpoint
from clusterfusion import Engine, _evaluation


@pytest.mark.parametrize(
    ("context", "continuation", "length", "expected"),
    [
        ([1, 2], [3], 8, ([1, 2], [3])),
        # The last token is not fed: length + 1 tokens fit.
        ([1, 2, 3], [4, 5], 4, ([1, 2, 3], [4, 5])),
        ([1, 2, 3, 4], [5, 6], 4, ([2, 3, 4], [5, 6])),
        ([1, 2, 3, 4], [5, 6, 7, 8], 4, ([4], [5, 6, 7, 8])),
    ],
)
def test_truncate_left(context, continuation, length, expected):
    assert _evaluation.truncate_left(context, continuation, length) == expected
    # As lm_eval's hf cuts its input: (context + continuation)[-(length + 1):][:-1].
    whole = (context + continuation)[-(length + 1) :]
    assert [*expected[0], *expected[1]] == whole


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 5)])
def test_truncate_left_refuses(context, continuation):
    with pytest.raises(ValueError, match="1 to 4 tokens, found"):
        _evaluation.truncate_left(context, continuation, 4)


@pytest.mark.parametrize(
    ("arguments", "stops", "options"),
    [
        ({}, [], {"max_new_tokens": 256, "temperature": 0.0}),
        ({"until": "\n"}, ["\n"], {"max_new_tokens": 256, "temperature": 0.0}),
        (
            {"until": ["a", "b"], "max_gen_toks": 5, "max_new_tokens": 6, "do_sample": False},
            ["a", "b"],
            {"max_new_tokens": 5, "temperature": 0.0},
        ),
        ({"max_completion_tokens": 7}, [], {"max_new_tokens": 7, "temperature": 0.0}),
        ({"temperature": 0.7}, [], {"max_new_tokens": 256, "temperature": 0.7}),
        # As hf: without do_sample the temperature does not count.
        ({"temperature": 0.7, "do_sample": False}, [], {"max_new_tokens": 256, "temperature": 0}),
        (
            {"do_sample": True, "temperature": 1, "top_k": 5, "top_p": 0.5, "num_beams": 1},
            [],
            {"max_new_tokens": 256, "temperature": 1.0, "top_k": 5, "top_p": 0.5},
        ),
    ],
)
def test_generate_options(arguments, stops, options):
    before = json.dumps(arguments)
    assert _evaluation.generate_options(arguments, 256) == (stops, options)
    assert json.dumps(arguments) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"until": 5}, TypeError, "until: expected a text or a list of texts, found 5"),
        ({"until": ["a", 5]}, TypeError, "until"),
        ({"do_sample": True}, ValueError, "temperature: expected a number above 0"),
        ({"num_beams": 4}, ValueError, "num_beams: expected 1"),
        ({"penalty_alpha": 0.5}, ValueError, r"found \['penalty_alpha'\]"),
    ],
)
def test_generate_options_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _evaluation.generate_options(arguments, 256)


def test_cut_at_stops():
    assert _evaluation.cut_at_stops("a b c", ["c", "b", ""]) == "a "
    assert _evaluation.cut_at_stops("x\n\n", ["\n\n", "x\n"]) == "x"
    assert _evaluation.cut_at_stops("x\n\n", ["x\n", "\n\n"]) == ""
    assert _evaluation.cut_at_stops("a", []) == "a"


def test_batch_requests():
    assert _evaluation.batch_requests(8, None) == 8
    assert _evaluation.batch_requests("8", 4) == 8
    assert _evaluation.batch_requests("auto", None) == 512
    assert _evaluation.batch_requests("auto:4", 16) == 16
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(ValueError, match="batch_size: expected a positive integer or auto"):
            _evaluation.batch_requests(wrong, None)


def test_device_and_dtype():
    names = {None: "auto", "cpu": "cpu", "cuda": "cuda", "cuda:0": "auto", "auto": "auto"}
    assert {name: _evaluation.device_name(name) for name in names} == names
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        _evaluation.device_name("cuda:1")
    with pytest.raises(ValueError, match=r"found 'mps'$"):
        _evaluation.device_name("mps")
    for dtype in (None, "auto", "float16", "torch.float16", "float32"):
        _evaluation.check_dtype(dtype, "float16", "cpu")
    with pytest.raises(ValueError, match=r"expected auto or float16.*found bfloat16"):
        _evaluation.check_dtype("bfloat16", "float16", "cpu")
    with pytest.raises(ValueError, match="found float32"):
        _evaluation.check_dtype("float32", "float16", "cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer="train")
    return folder, Engine(folder, device="cpu")


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [
        ({"bos_token": "a", "eos_token": "b"}, {"bos_token": "c"}, ("a", "b")),
        ({"bos_token": None, "eos_token": {"content": "b"}}, {"bos_token": "c"}, ("c", "b")),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, (None, None)),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, {}, ("<|endoftext|>", "<|endoftext|>")),
    ],
)
def test_special_tokens(checkpoint, tmp_path, config, special_map, expected):
    _, engine = checkpoint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    ids = _evaluation.special_token_ids(tmp_path, engine.tokenizer, engine.config)
    fallback = (engine.config.bos_token, engine.config.eos_tokens[0])
    assert ids == tuple(
        other if token is None else engine.tokenizer.token_to_id(token)
        for token, other in zip(expected, fallback, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "tokenizer_config.json: expected JSON"),
        ("[]", "expected an object, found list"),
        ('{"bos_token": "<s> is no token"}', "expected bos_token to be a token of tokenizer.json"),
        ('{"eos_token": 5}', "expected eos_token to be a token .*, found 5"),
    ],
)
def test_special_tokens_refuses(checkpoint, tmp_path, text, message):
    _, engine = checkpoint
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _evaluation.special_token_ids(tmp_path, engine.tokenizer, engine.config)
