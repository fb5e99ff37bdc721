"""A small Mixtral written by hand, and the program `mer` itself, for the tests of the command line."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from mer.cli.main import cli, main

MER = str(Path(sys.executable).with_name("mer"))


def environment(**more):
    """As in a user's terminal of 80 columns: what test runners set is left out."""
    dropped = ("MER_DEBUG", "FORCE_COLOR", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "COLUMNS": "80", "NO_COLOR": "1", **more}


def mer(*arguments, **options):
    """Run the program to its end; its output as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | options
    return subprocess.run([MER, *map(str, arguments)], text=True, check=False, **options)


def mer_here(*arguments, stdin="", **more):
    """As `mer`, by the same `main` in this process: to start one takes longer than most errors do.

    stdin: its text. more: of the environment. Not for signals, limits of a process, and what stays open.
    """
    with (
        TemporaryFile("w+", encoding="utf-8") as out,
        TemporaryFile("w+", encoding="utf-8") as err,
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["mer", *map(str, arguments)]),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")),
        patch.dict(os.environ, environment(**more), clear=True),
    ):
        with pytest.raises(SystemExit) as ended:
            main()
        texts = []
        for file in out, err:
            file.flush()
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(arguments, ended.value.code, *texts)


def called(*arguments) -> str:
    """What `mer` prints, called in this process: to start it takes longer than a small model does.

    For what succeeds; an error is raised.
    """
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def mixtral_config(**changes):
    config = {
        "model_type": "mixtral",
        "vocab_size": 50,
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    }
    return config | changes


def mixtral_shapes(config):
    """Name -> shape, as published checkpoints have them."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = shapes[name + "post_attention_layernorm.weight"] = (hidden,)
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{name}self_attn.{part}_proj.weight"] = (rows, hidden)
        block = name + "block_sparse_moe."
        shapes[block + "gate.weight"] = (config["num_local_experts"], hidden)
        for e in range(config["num_local_experts"]):
            for part in ("w1", "w3"):
                shapes[f"{block}experts.{e}.{part}.weight"] = (inter, hidden)
            shapes[f"{block}experts.{e}.w2.weight"] = (hidden, inter)
    return shapes


def write_mixtral(path, *, more=(), **changes):
    """A checkpoint of two F16 shards with an index. more: (name, shape) of tensors that no Mixtral has."""
    path.mkdir(parents=True)
    config = mixtral_config(**changes)
    rng = np.random.default_rng(0)
    shapes = mixtral_shapes(config) | dict(more)
    tensors = {
        name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()
    }
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"word": 0}, unk_token="word")).save(str(path / "tokenizer.json"))
    return tensors


def write_holes(path, config, dtype="BF16", width=2):
    """A checkpoint whose weights are holes in the file: of any size, it takes no space."""
    path.mkdir()
    header, at = {}, 0
    for name, shape in mixtral_shapes(config).items():
        size = width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (path / "config.json").write_text(json.dumps(config))
