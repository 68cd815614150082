"""The NumPy oracle against transformers in float64: recorded, and live where it is installed."""

import numpy as np
import pytest
from checkpoints import DTYPE_TAGS, weights_digest, write_random_checkpoint
from recordings import FamilyRecord, load_family
from reference_model import ACTIVATIONS, ReferenceModel, log_softmax, relative_error
from safetensors import safe_open

FAMILY = load_family()
# Both sides compute in float64; what is left is the order of sums, through up to five layers.
TOLERANCE = 1e-10


@pytest.fixture(params=FAMILY, ids=lambda record: record.name)
def record(request) -> FamilyRecord:
    return request.param


@pytest.fixture
def checkpoint(record, tmp_path):
    return write_random_checkpoint(tmp_path, **record.setting)


def test_checkpoints_are_those_of_the_recording(record, checkpoint):
    assert weights_digest(checkpoint) == record.digest


def test_logits_at_every_recorded_position(record, checkpoint):
    logits = ReferenceModel(checkpoint).logits(record.tokens)
    assert len(record.positions) == len(record.tokens) or len(record.tokens) > 256
    chosen = logits[record.positions]
    assert relative_error(chosen[:, record.sampled], record.logits) < TOLERANCE
    np.testing.assert_allclose(chosen[:, record.sampled], record.logits, atol=1e-9, rtol=0)
    log_sum_exp = chosen[:, 0] - log_softmax(chosen)[:, 0]
    np.testing.assert_allclose(log_sum_exp, record.log_sum_exp, atol=1e-9, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(chosen, axis=1), record.norm, rtol=TOLERANCE)


def test_greedy_continuation(record, checkpoint):
    tokens, margins = ReferenceModel(checkpoint).greedy(
        record.tokens[:9].tolist(), len(record.greedy)
    )
    assert tokens == record.greedy.tolist()
    np.testing.assert_allclose(margins, record.margins, atol=1e-5)


def test_recording_spans_the_family():
    settings = [record.setting for record in FAMILY]
    wide = [setting for setting in settings if "num_heads" in setting]
    combinations = {
        (s["hidden_size"] // s["num_heads"], s["dtype"], s["parallel_residual"]) for s in wide
    }
    assert len(combinations) == 6 * 3 * 2
    assert {head for head, _, _ in combinations} == {16, 32, 64, 80, 128, 256}
    assert {setting["hidden_act"] for setting in settings if "hidden_act" in setting} == set(
        ACTIVATIONS
    )
    for key, values in {
        "num_layers": {1, 2, 3, 5},
        "tied": {True, False},
        "prefix": {True, False},
        "attention_bias": {True, False},
        "config_style": {"old", "new"},
        "with_buffers": {True, False},
        "head_name": {"embed_out", "lm_head"},
        "shards": {1, 3},
    }.items():
        assert {setting[key] for setting in wide} == values


@pytest.mark.parametrize("dtype", DTYPE_TAGS)
def test_files_read_as_safetensors_reads_them(tmp_path, dtype):
    """The writer and the oracle's reader against the format's own library."""
    setting = {"dtype": dtype, "seed": 5, "with_buffers": True, "prefix": False}
    write_random_checkpoint(tmp_path, **setting)
    weights = ReferenceModel(tmp_path).weights
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        floats = {
            name for name, part in slices.items() if part.get_dtype() in ("F16", "BF16", "F32")
        }
        assert floats == set(weights)
        for name in floats:
            assert tuple(slices[name].get_shape()) == weights[name].shape
            if slices[name].get_dtype() != "BF16":  # NumPy has no bfloat16
                np.testing.assert_array_equal(file.get_tensor(name), weights[name])


def test_shards_hold_the_same_weights(tmp_path):
    one = write_random_checkpoint(tmp_path / "one", seed=6)
    many = write_random_checkpoint(tmp_path / "many", seed=6, shards=4)
    assert len(list(many.glob("*.safetensors"))) == 4
    first, second = ReferenceModel(one).weights, ReferenceModel(many).weights
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


def test_live_transformers_in_float64(record, checkpoint):
    pytest.importorskip("torch", reason="torch is not installed: recordings stand for it")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import transformers_logits

    live = transformers_logits(checkpoint, record.tokens, "float64")
    assert relative_error(ReferenceModel(checkpoint).logits(record.tokens), live) < TOLERANCE
    assert relative_error(live[record.positions][:, record.sampled], record.logits) < TOLERANCE
