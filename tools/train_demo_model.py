#!/usr/bin/env python3
"""Train the demo model: a small GPT-NeoX language model with a tokenizer of its own.

The result is a Hugging Face checkpoint folder (config.json, generation_config.json,
model.safetensors in fp16, tokenizer files, a model card and the log of its training) that
transformers loads unchanged. Needs torch, transformers and tokenizers; a GPU for real training.

  train_demo_model.py --data ../shared/data --minutes 8            the default recipe
  train_demo_model.py --data ../shared/data --minutes 8 --sweep    several at once, best kept
  train_demo_model.py --data ../shared/data --card-only            measure a finished folder again,
                                                                   and rewrite its model card

Training always ends on time: the learning rate falls to zero when either the recipe's epochs or
the minutes are used up, whichever comes first. The best checkpoint so far is on disk at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import lzma
import math
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MAX_PARAMETERS = 7_400_000
MAX_CHECKPOINT_BYTES = 15_000_000
LOG_NAME = "training_log.json"

# Sampling options of generation_config.json, and those of the samples in the model card.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 250}
# Written before the model was trained; every sample that they give is shown.
SAMPLE_PROMPTS = [
    "It was a cold evening in November, and the old house",
    '"Pray, sir," said the lady,',
    "The captain looked out upon the sea, and",
    "My dear Elizabeth,",
    "When I awoke the next morning,",
]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape of the model and how it is trained; the defaults are those of models/demo."""

    name: str = "default"
    vocab: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    intermediate: int = 1024
    tied: bool = True
    context: int = 1024
    rotary_pct: float = 0.25
    dropout: float = 0.15
    batch_tokens: int = 32768
    epochs: float = 35.4
    lr: float = 3e-3  # in AdamW's units for every parameter; see Muon
    weight_decay: float = 1.2  # matrices inside the layers
    embedding_decay: float = 0.1
    warmup: float = 0.02  # share of the run

    @staticmethod
    def parse(text: str, base: Recipe) -> Recipe:
        """Read `name:key=value,…` on top of `base`."""
        name, _, settings = text.partition(":")
        values: dict[str, Any] = {"name": name}
        types = {field.name: type(getattr(base, field.name)) for field in dataclasses.fields(base)}
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            if key not in types:
                raise SystemExit(f"recipe {name}: unknown setting {key!r}; one of {sorted(types)}")
            kind = types[key]
            values[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        return dataclasses.replace(base, **values)


# What --sweep compares. The data (about 6 M tokens) are seen dozens of times, so regularisation
# decides: dropout, weight decay, and how parameters are split between vocabulary and depth. The
# epochs are more than anyone gets through: the minutes end all of them together.
SWEEP = [
    "decay0.4-drop0.1:epochs=60,weight_decay=0.4,dropout=0.1",
    "decay1.2-drop0.05:epochs=60,weight_decay=1.2,dropout=0.05",
    "decay1.2-drop0.15:epochs=60,weight_decay=1.2,dropout=0.15",
    "vocab8k-6layers:epochs=60,vocab=8192,layers=6,weight_decay=0.8,dropout=0.1",
]


# ---------------------------------------------------------------- data and tokenizer


def read_novels(path: Path) -> str:
    """Read an .xz text whole."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --data must name the folder with {path.name}")
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def split_documents(text: str) -> list[str]:
    """Cut a corpus at its end-of-text marks."""
    documents = (document.strip("\r\n") for document in text.split(END_OF_TEXT))
    return [document for document in documents if document]


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with the normaliser, pre-tokenizer and decoder of GPT-NeoX-20B."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, each after an end-of-text token."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.append(end_of_text)
        ids.extend(encoding.ids)
    ids.append(end_of_text)
    return torch.tensor(ids, dtype=torch.int32)


def write_tokenizer(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": PADDING,
    }
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "GPTNeoXTokenizer",
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------- model


def build_model(recipe: Recipe, vocab: int) -> GPTNeoXForCausalLM:
    """Make the model, in fp32, with output projections scaled down by depth as in GPT-2."""
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        hidden_act="gelu",
        max_position_embeddings=recipe.context,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": recipe.rotary_pct,
        },
        tie_word_embeddings=recipe.tied,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scaled = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
                deviation = 0.02 / math.sqrt(2 * recipe.layers) if scaled else 0.02
                parameter.normal_(0.0, deviation, generator=generator)
    return model


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def rotary_tables(recipe: Recipe, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [context, rotary_dim]."""
    rotary_dim = int(recipe.hidden // recipe.heads * recipe.rotary_pct)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(recipe.context, dtype=torch.float64)[:, None] / 10000.0**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Apply GPT-NeoX's partial rotary embedding to [batch, heads, positions, head_dim]."""
    turning, still = x[..., : cosines.shape[-1]], x[..., cosines.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosines + torch.cat((-second, first), dim=-1) * sines
    return torch.cat((turned.to(x.dtype), still), dim=-1)


def layer_output(
    layer: torch.nn.Module,
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    heads: int,
    dropout: float,
) -> torch.Tensor:
    """Give what a layer makes of the residual stream, [batch, positions, hidden]."""
    batch, positions, hidden = x.shape
    qkv = layer.attention.query_key_value(layer.input_layernorm(x))
    qkv = qkv.view(batch, positions, heads, 3 * hidden // heads).transpose(1, 2)
    query, key, value = qkv.chunk(3, dim=-1)
    query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(batch, positions, -1)
    attended = layer.attention.dense(mixed)
    lifted = layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x))
    thought = layer.mlp.dense_4h_to_h(F.gelu(lifted))
    return x + F.dropout(attended, dropout, dropout > 0) + F.dropout(thought, dropout, dropout > 0)


def token_losses(
    model: GPTNeoXForCausalLM,
    tables: tuple[torch.Tensor, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    dropout: float,
    layer_function: Callable[..., torch.Tensor] = layer_output,
) -> torch.Tensor:
    """Give the mean loss in nats per token.

    The same function as transformers' module, written for torch.compile: no mask is ever
    materialised. main() compares the two before training starts.
    """
    neox = model.gpt_neox
    cosines, sines = (table[: inputs.shape[1]] for table in tables)
    x = F.dropout(neox.embed_in(inputs), dropout, dropout > 0)
    for layer in neox.layers:
        x = layer_function(layer, x, cosines, sines, model.config.num_attention_heads, dropout)
    logits = model.lm_head(neox.final_layer_norm(x))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def check_against_transformers(
    model: GPTNeoXForCausalLM, tables: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor
) -> None:
    """Stop if the training function is not the model that transformers will run."""
    inputs, targets = ids[None, :128].long(), ids[None, 1:129].long()
    ours = token_losses(model, tables, inputs, targets, 0.0)
    theirs = F.cross_entropy(model(inputs, use_cache=False).logits.float()[0], targets[0])
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
        raise SystemExit(f"training loss {ours.item()} is not transformers' loss {theirs.item()}")


# ---------------------------------------------------------------- optimiser


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Move [count, rows, columns] (rows >= columns) towards U Vᵀ: Muon's Newton-Schulz iteration.

    Coefficients: Jordan et al., "Muon: an optimizer for hidden layers", 2024.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT.to(matrices.dtype)


class Muon:
    """Muon for the matrices inside the layers.

    The step's size is scaled by 0.2 sqrt(max(rows, columns)) (Liu et al., "Muon is scalable for
    LLM training", 2025), so learning rate and weight decay mean what they mean to AdamW.
    """

    def __init__(self, model: GPTNeoXForCausalLM, momentum: float = 0.95) -> None:
        self.heads = model.config.num_attention_heads
        self.momentum = momentum
        self.parameters: list[torch.nn.Parameter] = []
        # Fused QKV is three square matrices; the down projection is taken transposed.
        self.groups: dict[tuple[int, int], list[tuple[torch.nn.Parameter, str]]] = {}
        for layer in model.gpt_neox.layers:
            for module, kind in (
                (layer.attention.query_key_value, "qkv"),
                (layer.attention.dense, "plain"),
                (layer.mlp.dense_h_to_4h, "plain"),
                (layer.mlp.dense_4h_to_h, "transposed"),
            ):
                parameter = module.weight
                shape = self._split(parameter, kind).shape[1:]
                self.groups.setdefault(tuple(shape), []).append((parameter, kind))
                self.parameters.append(parameter)
        self.buffers = {id(parameter): torch.zeros_like(parameter) for parameter in self.parameters}

    def _split(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "qkv":
            columns = tensor.shape[1]
            parts = tensor.reshape(self.heads, 3, -1, columns).transpose(0, 1)
            return parts.reshape(3, -1, columns)
        return tensor.mT[None] if kind == "transposed" else tensor[None]

    def _join(self, matrices: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "qkv":
            columns = matrices.shape[-1]
            parts = matrices.reshape(3, self.heads, -1, columns).transpose(0, 1)
            return parts.reshape(-1, columns)
        return matrices[0].mT if kind == "transposed" else matrices[0]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """Take one step with the gradients in the parameters."""
        gradients = [parameter.grad for parameter in self.parameters]
        buffers = [self.buffers[id(parameter)] for parameter in self.parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, self.momentum)
        directions = {id(p): d for p, d in zip(self.parameters, nesterov, strict=True)}
        torch._foreach_mul_(self.parameters, 1 - lr * weight_decay)
        for shape, members in self.groups.items():
            parts = [self._split(directions[id(parameter)], kind) for parameter, kind in members]
            updates = orthogonalise(torch.cat(parts)).split([part.shape[0] for part in parts])
            scale = 0.2 * math.sqrt(max(shape))
            for (parameter, kind), update in zip(members, updates, strict=True):
                parameter.sub_(self._join(update, kind), alpha=lr * scale)


def make_adamw(model: GPTNeoXForCausalLM, muon: Muon, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW for what Muon does not take: embeddings, biases, LayerNorms."""
    taken = {id(parameter) for parameter in muon.parameters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": recipe.embedding_decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        fused=next(model.parameters()).is_cuda,
    )


# ---------------------------------------------------------------- training


class Windows:
    """Endless batches of windows; each epoch cuts the text at a new offset, in a new order."""

    def __init__(self, ids: torch.Tensor, context: int, batch: int, seed: int) -> None:
        self.ids, self.context, self.batch = ids, context, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.per_epoch = (ids.numel() - 1) // context - 1
        if self.per_epoch < 1:
            raise SystemExit(f"the text has {ids.numel()} tokens, fewer than two windows")
        self.starts = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give inputs and targets, each [batch, context]."""
        while self.starts.numel() < self.batch:
            offset = torch.randint(self.context, (1,), generator=self.generator)
            order = torch.randperm(self.per_epoch, generator=self.generator)
            self.starts = torch.cat((self.starts, order * self.context + offset))
        starts, self.starts = self.starts[: self.batch], self.starts[self.batch :]
        starts = starts.to(self.ids.device, non_blocking=True)
        positions = torch.arange(self.context + 1, device=self.ids.device)
        windows = self.ids[starts[:, None] + positions].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 matrix products on a GPU, with fp32 weights; plain fp32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def quick_loss(
    model: GPTNeoXForCausalLM,
    tables: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    context: int,
    device: torch.device,
) -> float:
    """Validation loss over windows side by side, for the learning curve and the best checkpoint."""
    count = (ids.numel() - 1) // context
    inputs = ids[: count * context].view(count, context).long()
    targets = ids[1 : count * context + 1].view(count, context).long()
    rows = max(1, 32768 // context)
    total = 0.0
    with autocast(device):
        for begin in range(0, count, rows):
            part = slice(begin, begin + rows)
            loss = token_losses(model, tables, inputs[part], targets[part], 0.0)
            total += loss.item() * inputs[part].shape[0]
    return total / count


def export(
    state: dict[str, torch.Tensor], recipe: Recipe, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a checkpoint folder in fp16, replacing an earlier one only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = build_model(recipe, tokenizer.get_vocab_size())
    model.load_state_dict(state)
    model.half()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=1, **SAMPLING
    )
    model.save_pretrained(partial)
    write_tokenizer(tokenizer, recipe.context, partial)
    (partial / "model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class Corpus:
    """The novels as tokens of a tokenizer, or of one of so many entries that is made of them."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer | int) -> None:
        device = torch.device(args.device)
        documents = split_documents(read_novels(args.data / "novels-train.txt.xz"))
        if args.limit_documents:
            documents = documents[: args.limit_documents]
        if isinstance(tokenizer, int):
            tokenizer = train_tokenizer(documents, tokenizer)
        self.tokenizer = tokenizer
        self.train_ids = encode_documents(tokenizer, documents).to(device)
        valid_text = read_novels(args.data / "novels-valid.txt.xz")
        self.valid_ids = encode_documents(tokenizer, split_documents(valid_text)).to(device)
        self.valid_bytes = len(valid_text.encode())


class Training:
    """The data, the model and the optimisers of one recipe."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace, corpus: Corpus) -> None:
        self.recipe, self.device = recipe, torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.tokenizer, self.train_ids = corpus.tokenizer, corpus.train_ids
        self.valid_ids, self.valid_bytes = corpus.valid_ids, corpus.valid_bytes

        self.model = build_model(recipe, self.tokenizer.get_vocab_size()).to(self.device)
        self.parameters = count_parameters(self.model)
        self.tables = rotary_tables(recipe, self.device)
        check_against_transformers(self.model, self.tables, self.valid_ids)

        self.batch = max(1, recipe.batch_tokens // recipe.context)
        self.windows = Windows(self.train_ids, recipe.context, self.batch, args.seed)
        self.muon = Muon(self.model)
        self.adamw = make_adamw(self.model, self.muon, recipe)
        self.last_step = max(1, round(recipe.epochs * self.windows.per_epoch / self.batch))
        self.function, self.compiled = token_losses, False
        if args.compile == "on" or (args.compile == "auto" and self.device.type == "cuda"):
            self._compile()

    def _compile(self) -> None:
        try:
            layer = torch.compile(layer_output, dynamic=False)  # once for all layers
            candidate = functools.partial(token_losses, layer_function=layer)
            self._loss_and_gradients(candidate)
            self.function, self.compiled = candidate, True
        except Exception as error:  # any failure of the compiler: train without it
            print(
                f"{self.recipe.name}: torch.compile failed, going on without: {error}", flush=True
            )
        self.model.zero_grad(set_to_none=True)

    def _loss_and_gradients(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        inputs, targets = self.windows.next()
        with autocast(self.device):
            loss = function(self.model, self.tables, inputs, targets, self.recipe.dropout)
        loss.backward()
        return loss.detach()

    def step(self, progress: float) -> torch.Tensor:
        """Take one step, at this share of the training, and return its loss."""
        recipe = self.recipe
        rate = recipe.lr * min(1.0, progress / recipe.warmup, (1 - progress) / (1 - recipe.warmup))
        loss = self._loss_and_gradients(self.function)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(rate, recipe.weight_decay)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    def validation_loss(self, model: GPTNeoXForCausalLM) -> float:
        """Measure a model on the held-out novel."""
        return quick_loss(model, self.tables, self.valid_ids, self.recipe.context, self.device)


class Curve:
    """The learning curve of a training, in folder/curve.json; the best model in folder/model."""

    def __init__(self, training: Training, report_seconds: float, folder: Path) -> None:
        self.training, self.report_seconds, self.folder = training, report_seconds, folder
        self.log: dict[str, Any] = {
            "recipe": dataclasses.asdict(training.recipe),
            "parameters": training.parameters,
            "train_tokens": training.train_ids.numel(),
            "valid_tokens": training.valid_ids.numel(),
            "compiled": training.compiled,
            "curve": [],
        }
        self.begin = time.time()
        self.next_report = self.begin + report_seconds
        self.next_save = self.begin + 2 * report_seconds
        self.best, self.best_state, self.best_saved = math.inf, None, True
        self.losses = torch.zeros((), device=training.device)  # the sum since the last report
        self.reported_step, self.reported_at = 0, self.begin

    def report(self, step: int, done: bool) -> None:
        """Add a point, and save the best model if it is time to, or the last."""
        mean = self.losses.item() / max(1, step - self.reported_step)  # waits for the device
        now = time.time()
        loss = self.training.validation_loss(self.training.model)
        point = self._point(step, now, mean, loss)
        self.log["curve"].append(point)
        print(f"{self.training.recipe.name}: {json.dumps(point)}", flush=True)
        if loss < self.best:
            state = self.training.model.state_dict()
            self.best, self.best_saved = loss, False
            self.best_state = {k: v.detach().cpu().clone() for k, v in state.items()}
            self.log["best"] = point
        if self.best_state is not None and not self.best_saved and (done or now >= self.next_save):
            export(
                self.best_state,
                self.training.recipe,
                self.training.tokenizer,
                self.folder / "model",
            )
            self.best_saved, self.next_save = True, time.time() + 3 * self.report_seconds
        if done:
            self._measure_rounding()
        self.log["finished"] = done
        write_json(self.folder / "curve.json", self.log)
        self.losses.zero_()
        self.reported_step, self.reported_at = step, time.time()
        self.next_report = self.reported_at + self.report_seconds

    def _point(self, step: int, now: float, train_loss: float, valid_loss: float) -> dict[str, Any]:
        training = self.training
        bits_per_byte = (training.valid_ids.numel() - 1) / training.valid_bytes / math.log(2)
        tokens = (step - self.reported_step) * training.batch * training.recipe.context
        return {
            "step": step,
            "epoch": round(step * training.batch / training.windows.per_epoch, 3),
            "seconds": round(now - self.begin, 1),
            "train_loss": round(train_loss, 4),
            "valid_loss": round(valid_loss, 4),
            "valid_bits_per_byte": round(valid_loss * bits_per_byte, 4),
            "tokens_per_s": round(tokens / max(1e-9, now - self.reported_at)),
        }

    def _measure_rounding(self) -> None:
        """What the loss is with the weights as they are saved."""
        exported = GPTNeoXForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)
        loss = self.training.validation_loss(exported.to(self.training.device))
        self.log["fp16_effect"] = {"fp32_loss": self.best, "fp16_weights_loss": loss}


def train_demo(recipe: Recipe, args: argparse.Namespace, folder: Path, until: float) -> None:
    """Train a recipe of the demo model, which has to stay small."""
    training = Training(recipe, args, Corpus(args, recipe.vocab))
    if training.parameters > MAX_PARAMETERS:
        raise SystemExit(
            f"{recipe.name}: {training.parameters} parameters, at most {MAX_PARAMETERS}"
        )
    train(training, args, folder, until)


def train(training: Training, args: argparse.Namespace, folder: Path, train_until: float) -> None:
    """Train until then; leave the best checkpoint in folder/model, the log in folder/curve.json."""
    curve = Curve(training, args.report_seconds, folder)
    budget = max(1.0, train_until - curve.begin)
    step = 0
    while True:
        progress = max(step / training.last_step, (time.time() - curve.begin) / budget)
        done = progress >= 1
        if done or (step % 5 == 0 and time.time() >= curve.next_report):
            curve.report(step, done)
        if done:
            return
        curve.losses += training.step(progress)
        step += 1
        if step % 5 == 0 and training.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock that ends training runs ahead of the device


# ---------------------------------------------------------------- measuring and the model card


@torch.no_grad()
def evaluate(folder: Path, text: str, device: torch.device) -> dict[str, Any]:
    """Sliding-window loss of the exported checkpoint, run by transformers in fp32.

    Windows of the whole context, advanced by half of it; each token but the very first is scored
    once, with at least half a context before it wherever the text has that much.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text).ids, device=device)
    context = model.config.max_position_embeddings
    total, scored, end = 0.0, 0, 1
    for begin in range(0, ids.numel(), context // 2):
        window = ids[begin : begin + context]
        stop = begin + window.numel()
        fresh = stop - end
        if fresh <= 0:
            break
        logits = model(window[None, :-1], use_cache=False).logits[0, -fresh:].float()
        total += F.cross_entropy(logits, window[-fresh:], reduction="sum").item()
        scored, end = scored + fresh, stop
    first = len(tokenizer.decode([int(ids[0])], skip_special_tokens=False).encode())
    size = len(text.encode()) - first
    return {
        "context": context,
        "stride": context // 2,
        "tokens": scored,
        "bytes": size,
        "loss": total / scored,
        "perplexity": math.exp(total / scored),
        "bits_per_byte": total / math.log(2) / size,
    }


def draw_samples(folder: Path) -> list[dict[str, Any]]:
    """Run the card's prompts, each with its own seed, on the CPU in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.set_num_threads(min(4, torch.get_num_threads()))
    samples = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS, start=1):
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                top_k=0,
                **SAMPLING,
            )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append({"seed": seed, "prompt": prompt, "text": text})
    return samples


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say what the numbers were made with."""
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
        machine["driver"] = run_quietly(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    machine["commit"] = run_quietly(["git", "rev-parse", "HEAD"])
    return machine


def run_quietly(command: list[str]) -> str | None:
    """Give a command's output, or None if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# README.md, without what the training log says.
CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
<!-- Written by tools/train_demo_model.py from {log_name}; do not edit. -->
# The demo model

A GPT-NeoX language model of {run[parameters]:,} parameters that writes clumsy Victorian
prose. It ships with the project so that text can be generated, and tests can run on a really
trained model, on any machine and without a download. It knows nothing of the world and is good
for nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/demo")
model = AutoModelForCausalLM.from_pretrained("models/demo")
```

| | |
|---|---|
| architecture | GPT-NeoX, parallel residual: {recipe.layers} layers, hidden size {recipe.hidden}, \
{recipe.heads} heads of {head_size}, rotary share {recipe.rotary_pct}, \
{tied} output embedding |
| context | {recipe.context} tokens |
| weights | fp16, {weight_bytes:,} bytes |
| tokenizer | byte-level BPE of {recipe.vocab:,} entries, NFC, trained on the same text |
| licence | Apache-2.0, like the project; the text is in the public domain |

## Held-out text

One novel that it never saw, {measured[bytes]:,} bytes, {measured[tokens]:,} tokens; fp16
weights, transformers in fp32, windows of {measured[context]} tokens advanced by
{measured[stride]} (rounding the weights to fp16 moves the loss by {fp16_effect:+.5f}):

| validation loss (nats per token) | perplexity (per token) | bits per byte |
|---|---|---|
| {measured[loss]:.4f} | {measured[perplexity]:.3f} | {measured[bits_per_byte]:.4f} |

## Data

35 English novels, 1838 to 1921, in the public domain: {data[train_bytes]:,} bytes,
{run[train_tokens]:,} tokens (`novels-train.txt.xz`,
sha256 `{data[train_sha256]}`).
Held out: one more of them (`novels-valid.txt.xz`, sha256 `{data[valid_sha256]}`).
It speaks as those books do, of women, servants and foreigners too.

## Recipe

`tools/train_demo_model.py`, seed {seed}: {best[epoch]:.1f} epochs ({best[step]:,} steps
of {recipe.batch_tokens:,} tokens), windows cut at a new offset each epoch; Muon for the matrices
inside the layers (weight decay {recipe.weight_decay}), AdamW for the rest (weight decay
{recipe.embedding_decay} on the embedding); learning rate {recipe.lr}, warm-up over
{recipe.warmup:.0%}, then linearly to zero; dropout {recipe.dropout}; bf16 matrix products, fp32
weights; the checkpoint with the lowest validation loss is kept.

{device}: {best[seconds]:.0f} s of training for this recipe. Python {machine[python]},
torch {machine[torch]}, transformers {machine[transformers]},
tokenizers {machine[tokenizers]}.
{comparison}
| epoch | seconds | training loss | validation loss |
|---|---|---|---|
{rows}

The training loss is measured with dropout. Everything above is in `{log_name}`.

## Samples

Not chosen: prompts and seeds were fixed before training, and these are their first outputs.
transformers, fp32, CPU; {options}. These options are the defaults in `generation_config.json`.

{samples}"""


def write_card(folder: Path, log: dict[str, Any]) -> None:
    """Write README.md from the training log."""
    recipe, machine = Recipe(**log["run"]["recipe"]), log["machine"]
    effect = log["run"].get("fp16_effect")
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    text = CARD.format(
        log_name=LOG_NAME,
        run=log["run"],
        data=log["data"],
        seed=log["seed"],
        measured=log["validation"],
        best=log["run"]["best"],
        machine=machine,
        device=machine["device"] + driver,
        recipe=recipe,
        head_size=recipe.hidden // recipe.heads,
        tied="tied" if recipe.tied else "untied",
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        fp16_effect=effect["fp16_weights_loss"] - effect["fp32_loss"] if effect else math.nan,
        comparison=compare_candidates(log["candidates"]),
        rows=tabulate_curve(log["run"]["curve"]),
        options=", ".join(
            f"{key} {value}" for key, value in SAMPLING.items() if key != "do_sample"
        ),
        samples=show_samples(log["samples"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def tabulate_curve(curve: list[dict[str, Any]]) -> str:
    """Return about ten rows of the learning curve."""
    return "\n".join(
        f"| {p['epoch']:.1f} | {p['seconds']:.0f} | {p['train_loss']:.3f} | {p['valid_loss']:.3f} |"
        for p in curve[:: max(1, len(curve) // 10)]
    )


def compare_candidates(candidates: list[dict[str, Any]]) -> str:
    """Say which recipes were trained, if there were several."""
    if len(candidates) < 2:
        return ""
    others = "\n".join(
        f"| {r['recipe']['name']} | {r['parameters']:,} | {r['best']['epoch']:.1f} "
        f"| {r['validation']['loss']:.4f} | {r['validation']['bits_per_byte']:.4f} |"
        for r in candidates
    )
    return f"""
The recipe was chosen among these, trained at once on the same GPU for the same time, by
bits per byte on the held-out novel (so that figure is slightly optimistic):

| recipe | parameters | epochs | validation loss | bits per byte |
|---|---|---|---|---|
{others}
"""


def show_samples(samples: list[dict[str, Any]]) -> str:
    """Quote what the model wrote."""
    return "\n".join(
        f"### Seed {s['seed']}\n\n> **{s['prompt']}**"
        + s["text"].rstrip().replace("\n", "\n> ")
        + "\n"
        for s in samples
    )


def describe_data(data: Path) -> dict[str, Any]:
    """Sizes and hashes of both texts."""
    facts: dict[str, Any] = {}
    for name in ("train", "valid"):
        path = data / f"novels-{name}.txt.xz"
        facts[f"{name}_bytes"] = len(read_novels(path).encode())
        facts[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def bundle(folder: Path, target: Path) -> None:
    """Copy the folder into target/demo.tar, and its log beside it."""
    target.mkdir(parents=True, exist_ok=True)
    partial = target / "demo.tar.partial"
    with tarfile.open(partial, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=f"demo/{path.name}")
    partial.replace(target / "demo.tar")
    if (folder / LOG_NAME).is_file():
        shutil.copy(folder / LOG_NAME, target / LOG_NAME)


# ---------------------------------------------------------------- several recipes at once


def read_curve(folder: Path) -> dict[str, Any] | None:
    """Give a run's log so far, or None if it has not reported yet."""
    path = folder / "curve.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def keep_best(work: Path, recipes: list[Recipe], args: argparse.Namespace) -> str | None:
    """Copy the best exported checkpoint so far to --bundle; give its name."""
    found = []
    for recipe in recipes:
        log = read_curve(work / recipe.name)
        if log and "best" in log and (work / recipe.name / "model").is_dir():
            found.append((log["best"]["valid_bits_per_byte"], recipe.name))
    if not found:
        return None
    name = min(found)[1]
    if args.bundle:
        with contextlib.suppress(OSError):  # the run may be replacing it just now
            bundle(work / name / "model", args.bundle)
    return name


def train_all(recipes: list[Recipe], args: argparse.Namespace, work: Path, until: float) -> None:
    """Train each recipe in a process of its own, all on one device."""
    children = []
    for recipe in recipes:
        (work / recipe.name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", str(Path(__file__).resolve()), "--data", str(args.data)]
        command += ["--device", args.device, "--seed", str(args.seed), "--compile", args.compile]
        command += ["--report-seconds", str(args.report_seconds), "--work", str(work)]
        command += ["--limit-documents", str(args.limit_documents)]
        command += ["--child", json.dumps(dataclasses.asdict(recipe)), "--until", str(until)]
        with open(work / recipe.name / "output.txt", "w") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        children.append((recipe, child))
    begin = printed = saved = time.time()
    while any(child.poll() is None for _, child in children):
        time.sleep(1)
        now = time.time()
        if now > until + 30:  # a child that does not end on time is ended; its best is on disk
            for _, child in children:
                child.kill()
        if now - printed >= 15:
            printed = now
            print_progress(work, recipes, now - begin)
        if now - saved > 60:
            saved = now
            keep_best(work, recipes, args)
    print_progress(work, recipes, time.time() - begin)
    for recipe, child in children:
        if child.returncode != 0:
            tail = (work / recipe.name / "output.txt").read_text(errors="replace")[-1500:]
            print(f"{recipe.name} ended with code {child.returncode}:\n{tail}", flush=True)


def print_progress(work: Path, recipes: list[Recipe], elapsed: float) -> None:
    """Print one line: for each recipe epoch, losses, bits per byte, speed."""
    parts = []
    for recipe in recipes:
        log = read_curve(work / recipe.name)
        if log and log["curve"]:
            point = log["curve"][-1]
            parts.append(
                f"{recipe.name} e{point['epoch']:.1f} {point['train_loss']:.3f}/"
                f"{point['valid_loss']:.3f} {point['valid_bits_per_byte']:.4f}bpb "
                f"{point['tokens_per_s'] / 1e3:.0f}k/s"
            )
    print(f"[{elapsed:4.0f} s] " + (" | ".join(parts) or "starting"), flush=True)


def finish(recipes: list[Recipe], args: argparse.Namespace, work: Path, begin: float) -> None:
    """Measure every candidate, keep the best, write log and card."""
    device = torch.device(args.device)
    valid_text = read_novels(args.data / "novels-valid.txt.xz")
    candidates = []
    for recipe in recipes:
        log, model = read_curve(work / recipe.name), work / recipe.name / "model"
        if log is None or not model.is_dir():
            continue
        log["validation"] = evaluate(model, valid_text, device)
        print(f"{recipe.name}: {json.dumps(log['validation'])}", flush=True)
        candidates.append(log)
    if not candidates:
        raise SystemExit("no recipe left a checkpoint")
    candidates.sort(key=lambda log: log["validation"]["bits_per_byte"])
    best = candidates[0]
    chosen = work / best["recipe"]["name"] / "model"
    args.out.mkdir(parents=True, exist_ok=True)
    for path in chosen.iterdir():
        shutil.copy(path, args.out / path.name)
    full_log = {
        "seed": args.seed,
        "seconds": round(time.time() - begin, 1),
        "data": describe_data(args.data),
        "machine": describe_machine(device),
        "run": {key: value for key, value in best.items() if key != "validation"},
        "validation": best["validation"],
        "candidates": [
            {key: log[key] for key in ("recipe", "parameters", "best", "validation", "curve")}
            for log in candidates
        ],
        "samples": [],
    }
    conclude(args, full_log)


def conclude(args: argparse.Namespace, log: dict[str, Any]) -> None:
    """Draw the samples; write log, card and bundle; check what was promised."""
    write_json(args.out / LOG_NAME, log)
    if args.bundle:
        bundle(args.out, args.bundle)
    log["samples"] = draw_samples(args.out)
    write_json(args.out / LOG_NAME, log)
    write_card(args.out, log)
    size = (args.out / "model.safetensors").stat().st_size
    if size > MAX_CHECKPOINT_BYTES:
        raise SystemExit(f"model.safetensors has {size} bytes, at most {MAX_CHECKPOINT_BYTES}")
    if args.bundle:
        bundle(args.out, args.bundle)
    for sample in log["samples"]:
        print(f"--- seed {sample['seed']}\n{sample['prompt']}{sample['text']}", flush=True)
    measured = log["validation"]
    print(
        f"{log['run']['recipe']['name']}: {measured['bits_per_byte']:.4f} bits per byte, "
        f"perplexity {measured['perplexity']:.3f}; written to {args.out}",
        flush=True,
    )


def measure_again(args: argparse.Namespace) -> None:
    """Evaluate a finished folder, draw its samples and rewrite its card."""
    path = args.out / LOG_NAME
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --card-only needs the log that training wrote")
    log = json.loads(path.read_text(encoding="utf-8"))
    valid_text = read_novels(args.data / "novels-valid.txt.xz")
    log["validation"] = evaluate(args.out, valid_text, torch.device(args.device))
    conclude(args, log)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with novels-*.txt.xz"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models/demo"), help="checkpoint folder to write"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        help="also keep demo.tar and the log here, from the first checkpoint on",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/train_demo_model"),
        help="folder for what training leaves",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="training ends this long after the start; measuring takes about a minute more",
    )
    add_training_arguments(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what is trained, and how."""
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile; auto: on a GPU",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train the built-in list of recipes at once, keep the best",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,…",
        help="a recipe to train; several are trained at once",
    )
    parser.add_argument(
        "--card-only", action="store_true", help="measure --out again and rewrite its card"
    )
    parser.add_argument("--report-seconds", type=float, default=10.0)
    parser.add_argument(
        "--limit-documents",
        type=int,
        default=0,
        help="train on the first novels only (to try the tool)",
    )


def main() -> None:
    """Run what the command line asks for."""
    begin = time.time()
    args = parse_arguments()
    if args.child:
        recipe = Recipe(**json.loads(args.child))
        train_demo(recipe, args, args.work / recipe.name, args.until)
        return
    if args.card_only:
        measure_again(args)
        return
    texts = args.recipe + (SWEEP if args.sweep else [])
    recipes = [Recipe.parse(text, Recipe()) for text in texts] or [Recipe()]
    if len({recipe.name for recipe in recipes}) != len(recipes):
        raise SystemExit("two recipes have the same name")
    shutil.rmtree(args.work, ignore_errors=True)
    train_all(recipes, args, args.work, begin + 60 * args.minutes)
    finish(recipes, args, args.work, begin)


if __name__ == "__main__":
    main()
