"""`mer draft train`: on a small model in seconds; what it refuses."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from attrs import asdict
from click.testing import CliRunner
from draft_models import main_weights
from engine_models import GREEDY, make, opened, write_text_model
from safetensors.torch import load_file, save_file
from test_draft_head import forward, run

from mer.cli.draft import draft
from mer.model.draft_head import fingerprint, open_head
from mer.train.fit import MainModel
from mer.train.head import HeadSizes, TorchHead

SIZES = HeadSizes(64, 211, 4, 2, 16, 48, 24, 10000.0, 1e-5)


def train(*arguments, **options):
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(draft, ["train", *map(str, arguments), *given], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, head, what was printed); the model goes by the last token, mostly."""
    path = tmp_path_factory.mktemp("trained")
    make(path / "model", "mixtral", num_hidden_layers=1, vocab_size=64)
    tensors = load_file(path / "model" / "model.safetensors")
    for name in tensors:
        if "o_proj" in name or "down_proj" in name or "w2" in name:
            tensors[name] *= 0.1
    save_file(tensors, path / "model" / "model.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng(0)
    (path / "ids.txt").write_text(" ".join(map(str, rng.integers(1, 64, 1500))))
    result = train(
        path / "model", path / "ids.txt", out=path / "head", steps=60, batch=8, length=48, own=0.2, passes=2,
        rate=0.01, window=24, vocabulary=50, threads=1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path / "model", path / "head", result.output


def test_it_is_better_than_chance(trained):
    _, head, output = trained
    config = json.loads((head / "config.json").read_text())
    found = config["training"]["acceptance"]
    assert len(found) == 2
    assert min(found) > 0.3  # of 64 tokens
    assert f"right at each position, where those before it were: {found[0]:.0%}" in " ".join(output.split())
    assert {file.name for file in head.iterdir()} == {"config.json", "model.safetensors"}


async def test_it_drafts_for_its_model(trained):
    model, head, _ = trained
    async with opened(model, speculate="off") as engine:
        expected = (await engine.generate([5, 6, 7], GREEDY)).token_ids
    async with opened(model, draft_head=head) as engine:
        assert (await engine.generate([5, 6, 7], GREEDY)).token_ids == expected
    spec, _ = main_weights(model)
    assert len(open_head(head, spec).vocabulary) == 50


@pytest.mark.parametrize("began", [3, 30])
def test_passes_are_what_is_drafted(began, tmp_path):
    """All drafts at once in training, one token after the other in the engine."""
    make(tmp_path / "model", "mixtral")
    torch.manual_seed(3)
    head = TorchHead(SIZES)
    with torch.no_grad():
        for value in head.parameters():
            value.copy_((1 + 0.2 * torch.randn_like(value)) if value.dim() == 1 else value * 3)
    spec, dense = main_weights(tmp_path / "model")
    write(tmp_path / "head", head, dense)
    engine = forward(tmp_path / "head", tmp_path / "model")
    rng = np.random.default_rng(1)
    tokens, states = rng.integers(0, 211, 40), rng.standard_normal((40, 64), np.float32)
    main = MainModel(spec, dense, None)
    with torch.no_grad():
        passes = list(head.passes(main.embed(tokens)[None], torch.from_numpy(states)[None], 3))
    run(engine, tokens[:began], states[:began])
    left = states[began]
    for number, expected in enumerate(passes):
        at = began + number
        _, after = run(engine, tokens[at : at + 1], left[None], at)
        left = after[0]
        np.testing.assert_allclose(left, expected[0, at], atol=1e-4)


def write(path, head, dense):
    path.mkdir()
    save_file(
        {name: value.detach().contiguous() for name, value in head.named_parameters()},
        path / "model.safetensors",
    )
    config = {"format": "mer-draft-head", "version": 1, "fingerprint": fingerprint(dense), **asdict(SIZES)}
    (path / "config.json").write_text(json.dumps(config))


def test_what_is_refused(tmp_path, monkeypatch):
    model = write_text_model(tmp_path / "model")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(Exception, match="too few for windows of 256 tokens"):
        train(model, tmp_path / "short.txt", out=tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(Exception, match="is not UTF-8 text"):
        train(model, tmp_path / "latin.txt", out=tmp_path / "out")
    make(tmp_path / "bare", "mixtral")
    with pytest.raises(Exception, match="'too' is no token id"):
        train(tmp_path / "bare", tmp_path / "short.txt", out=tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    with pytest.raises(Exception, match=r"pip install 'mer\[train\]'"):
        train(model, tmp_path / "short.txt", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
