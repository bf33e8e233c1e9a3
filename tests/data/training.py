"""Two epochs as an experiment file has them, on a small corpus in the layout of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from counterpoise.config import read_yaml, resolve
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import RunFolder

EXPERIMENTS = Path(__file__).parents[2] / "trainables/experiments"


def two_epochs(name: str, corpus: str, place: Path, *sets: str) -> dict[str, Any]:
    """The summary of `trainables/experiments/NAME.yaml` with `sets`, trained on the corpus for two epochs."""
    more = [f"corpus={corpus}", "epochs=2", "method.check_every=1", *sets]
    experiment, provenance = resolve(read_yaml(EXPERIMENTS / f"{name}.yaml"), more)
    text = yaml.safe_dump(experiment.to_json())
    run = RunFolder.create(str(place), "run", experiment_text=text, provenance=provenance, manifest={})
    summary = execute(Job(experiment.to_json(), run.uri, threads=1), SingleComm())
    assert summary is not None
    return summary


def tiny_bert(place: Path) -> str:
    """A folder as `google-bert/bert-base-uncased` is one: tokenizer, configuration and (random) weights."""
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "text", "of", "tweet", "is", "it", "$", "t"]
    letters = [chr(c) for c in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    vocabulary = [*words, *(x for x in letters if x not in words), *(f"##{x}" for x in letters)]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(place)
    (place / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(place)
