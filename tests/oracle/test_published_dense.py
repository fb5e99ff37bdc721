"""A published dense model, SmolLM2-135M-Instruct in Q4_1, as a GGUF file in place: beside llama.cpp, with
exact arithmetic as the judge."""

from __future__ import annotations

import evidence
import gguf
import numpy as np
import pytest
import torch
import transformers
from cli_models import mer
from llama_cpp import LlamaCpp
from published_models import smollm2

from mer import Engine, SamplingParams
from mer.model.families import load
from mer.model.tokenizer import Tokenizer
from mer.weights.checkpoint import open_checkpoint

# Both round activations to 8 bits, in other groups and orders: against exact arithmetic the logarithm of
# a probability is off by 0.06 in the median, by 0.2 to 0.45 in the worst twentieth, of either. So two
# tokens that are nearer to each other than this may change places.
NEAR = 0.4
TOKENS = 24
TEXTS = [
    "Hello world",
    "  two spaces,\n\n\ttabs and  trailing ",
    "def f(x): return x**2 + 1234567890.5e-3  # déjà vu",
    "日本語とعربيและ हिन्दी 🎉👩‍👩‍👧 ½ ﬁ",
    "I'll, you're, IT'S <|im_start|>user\nnot special: <|im|> <|endoftext|>",
    "",
]
PROMPTS = [
    "Once upon a time",
    "def fibonacci(n):\n",
    "Q: What is 12 times 12?\nA:",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light."},
        {"role": "user", "content": "And at sunset?"},
    ],
]


@pytest.fixture(scope="module")
def path():
    return smollm2()


@pytest.fixture(scope="module")
def peer(path):
    with LlamaCpp(path) as found:
        yield found


@pytest.fixture(scope="module")
def exact(path):
    """The model by transformers in F32, with the weights that the gguf package decodes."""
    reader = gguf.GGUFReader(path)

    def said(key):
        return reader.get_field(f"llama.{key}").contents()

    heads, kv_heads = said("attention.head_count"), said("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=len(reader.get_field("tokenizer.ggml.tokens").data),
        hidden_size=said("embedding_length"),
        intermediate_size=said("feed_forward_length"),
        num_hidden_layers=said("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=said("context_length"),
        rms_norm_eps=said("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": said("rope.freq_base")},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            values = weights.pop(names.get_name(name, try_suffixes=(".weight",)))
            n = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
            if n is not None:  # rows that turn together are neighbours in llama.cpp
                values = values.reshape(n, -1, 2, values.shape[1]).swapaxes(1, 2)
            tensor.copy_(torch.tensor(values).reshape(tensor.shape))
    assert not weights
    return model


def test_tokens(path, peer):
    tokenizer = Tokenizer.open(path)
    for text in [*TEXTS, *PROMPTS, *map(peer.chat, CHATS)]:
        assert tokenizer.encode(text) == peer.tokens(text), text
        assert tokenizer.encode(text, special=False) == peer.tokens(text, special=False), text


async def test_greedy_answers(path, peer, exact):
    """Token by token; where llama.cpp takes another, the two are near by exact arithmetic, and it goes on
    with the one that mer took."""
    checkpoint = open_checkpoint(path)
    evidence.opened(checkpoint, load(checkpoint))
    evidence.asked("llama.cpp")
    evidence.asked("transformers")
    same, others, ours_off, peers_off = 0, 0, [], []
    async with Engine.open(path, context=512) as engine:
        prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
        for chat in CHATS:
            prompts.append(engine.chat_prompt(chat))
            assert prompts[-1] == peer.tokens(peer.chat(chat), special=False)
        for prompt in prompts:
            asked = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5)
            answer = await engine.generate(prompt, asked)
            ids = list(answer.token_ids)
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1).numpy()
            done = 0
            while done < len(ids):
                for drawn in peer.greedy(prompt + ids[:done], len(ids) - done, top=5):
                    ours, row = answer.logprobs[done], expected[done]
                    ours_off += [abs(p - row[id]) for id, _, p in ours.top]
                    peers_off += [abs(p - row[id]) for id, p in drawn.top.items()]
                    done += 1
                    if drawn.id != ours.token_id:
                        others += 1
                        assert abs(row[drawn.id] - row[ours.token_id]) < NEAR, (prompt, ids[:done], drawn)
                        break
                    same += 1
    checkpoint = open_checkpoint(path)
    evidence.opened(checkpoint, load(checkpoint))
    evidence.asked("llama.cpp")
    evidence.asked("transformers")
    assert others < 0.1 * same
    for share in (0.5, 0.95):
        assert np.quantile(ours_off, share) < 1.25 * np.quantile(peers_off, share)


def test_command_line(path):
    """What a newcomer does with such a file."""
    asked = ("--temperature", "0", "-n", "12", "--context", "256")
    run = mer("run", path, "--chat", "Say hello.", *asked)
    assert run.returncode == 0, run.stderr
    assert "the model is dense" in run.stderr
    chat = mer("chat", path, *asked, input="Say hello.\n")
    assert chat.stdout.split() == run.stdout.split() != []
    refused = mer("run", path, "x", "--ram", "128MiB")
    assert refused.returncode == 1
    assert "dense model" in refused.stderr
