"""A small byte-level BPE tokenizer, trained by `tokenizers` on two lines, for models that shall have text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_LINES = [
    "The old man looked at the sea and said: it will rain before the night, my boy.",
    "naïve café, Ελληνικά, русский язык, 你好，世界！ 🙂🙃 and so on; 0 12 345 6789",
]
EOS = 0
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(path: Path, *, vocab: int = 300, chat: bool = False) -> Tokenizer:
    """tokenizer.json with `vocab` tokens (0 is </s>, every byte has one) and, with `chat`, a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "clean_up_tokenization_spaces": False}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer
