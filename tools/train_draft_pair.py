#!/usr/bin/env python3
"""Train a target and a small draft for it on the novels, for benchmarks of speculation.

    train_draft_pair.py OUT --data ../shared/data [--seconds 65] [--draft-seconds 15]
                        [--device cuda]

Writes two checkpoint folders in fp16, OUT/target (12 layers of 768, as Pythia-160m) and OUT/draft
(6 of 128, as Pythia-14m), with the tokenizer of models/demo, which may draft for the target too,
and OUT/pair.json, which says how they were trained. Models trained so briefly do not copy what
stands in a prompt, as larger ones do: so a share of the windows say a passage again and again, with
edits. Needs torch, transformers and tokenizers; a GPU for real training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train_demo_model import (
    Corpus,
    Recipe,
    Training,
    Windows,
    add_training_arguments,
    describe_machine,
    train,
    write_json,
)

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "demo" / "tokenizer.json"
# How many epochs there are is for the clock to say.
COMMON = Recipe(tied=False, dropout=0.0, epochs=1e6, weight_decay=0.4)
TARGET = dataclasses.replace(
    COMMON, name="target", hidden=768, layers=12, heads=12, intermediate=3072, lr=2e-3
)
DRAFT = dataclasses.replace(
    COMMON, name="draft", hidden=128, layers=6, heads=4, intermediate=512, lr=4e-3
)
# To try the tool.
SMALL_TARGET = dataclasses.replace(
    COMMON, name="target", hidden=128, layers=3, heads=4, intermediate=512, context=256
)
SMALL_DRAFT = dataclasses.replace(
    COMMON, name="draft", hidden=32, layers=2, heads=2, intermediate=64, context=256
)

REPEATING_SHARE = 0.2  # of the windows
SHORTEST_PASSAGE = 24  # tokens
EDITED_SHARE = 0.03  # of the tokens of what is said again


class RepeatingWindows(Windows):
    """Windows of which some say their first passage again and again, with edits."""

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give inputs and targets, each [batch, context]."""
        inputs, targets = super().next()
        whole = torch.cat((inputs, targets[:, -1:]), dim=1)
        draw = lambda *shape: torch.rand(*shape, generator=self.generator)  # noqa: E731
        for row in range(self.batch):
            if draw(1).item() >= REPEATING_SHARE:
                continue
            longest = self.context // 2
            length = SHORTEST_PASSAGE + int(draw(1).item() * (longest - SHORTEST_PASSAGE))
            places = torch.arange(self.context + 1) % length
            said_again = whole[row, places.to(whole.device)]
            edited = draw(self.context + 1) < EDITED_SHARE
            edited[:length] = False
            others = (draw(self.context + 1) * self.ids.numel()).long()
            whole[row] = torch.where(
                edited.to(whole.device), self.ids[others.to(whole.device)].long(), said_again
            )
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()


def train_one(recipe: Recipe, args: argparse.Namespace, corpus: Corpus, seconds: float) -> dict:
    """Train for so long, compiling not included; return the log."""
    training = Training(recipe, args, corpus)
    training.windows = RepeatingWindows(corpus.train_ids, recipe.context, training.batch, args.seed)
    folder = args.out / f"{recipe.name}.training"
    folder.mkdir(parents=True, exist_ok=True)
    train(training, args, folder, time.time() + seconds)
    finished = args.out / recipe.name
    shutil.rmtree(finished, ignore_errors=True)
    (folder / "model").rename(finished)
    log = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return log


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seconds", type=float, default=65, help="of the target's training")
    parser.add_argument("--draft-seconds", type=float, default=15)
    parser.add_argument("--small", action="store_true", help="tiny models, to try the tool")
    add_training_arguments(parser)
    args = parser.parse_args()
    begin = time.time()
    corpus = Corpus(args, Tokenizer.from_file(str(TOKENIZER)))
    draft, target = (SMALL_DRAFT, SMALL_TARGET) if args.small else (DRAFT, TARGET)
    # To compile the draft would take as long as to train it.
    uncompiled = argparse.Namespace(**vars(args) | {"compile": "off"})
    logs = [
        train_one(draft, uncompiled, corpus, args.draft_seconds),
        train_one(target, args, corpus, args.seconds),
    ]
    pair = {
        "seconds": round(time.time() - begin, 1),
        "machine": describe_machine(torch.device(args.device)),
        "repeating_share": REPEATING_SHARE,
        "edited_share": EDITED_SHARE,
        "models": logs,
    }
    write_json(args.out / "pair.json", pair)
    for log in logs:
        name, best = log["recipe"]["name"], log["best"]
        print(
            f"{name}: {log['parameters']} parameters, {best['epoch']} epochs, "
            f"{best['valid_bits_per_byte']} bits per byte of the held-out novel"
        )


if __name__ == "__main__":
    main()
