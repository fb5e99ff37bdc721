"""What tests/fuzz_headers.py begins with: headers of small models."""

import json
import tempfile
from pathlib import Path

from gguf_models import write_gguf
from oracle.make_checkpoints import make
from test_gguf_tokenizer import bpe_settings
from tokenizer_models import byte_level

from mer.weights.gguf import read_gguf


def add_tokenizer(writer) -> None:
    for name, value in bpe_settings(byte_level(), "qwen2").items():
        getattr(writer, f"add_{name}")(value)


def write_seeds(kind: str, folder: Path) -> None:
    """Files of several families, such as they are published, without their weights."""
    folder.mkdir(exist_ok=True)
    families = ("qwen3_moe", "deepseek_v3", "gemma4_text", "qwen3_next", "gpt_oss", "lfm2_moe", "llama")
    for family in families if kind == "gguf" else families[:2]:
        with tempfile.TemporaryDirectory() as place:
            model = make(Path(place) / "hf", family)
            if kind == "gguf":
                more = {"tokenizer": add_tokenizer} if family == "qwen3_moe" else {}
                path = write_gguf(model, Path(place) / "x.gguf", **more)
                data = path.read_bytes()[: read_gguf(path).tensors[0].offset]
            else:
                data = (Path(place) / "hf/model.safetensors").read_bytes()
                data = data[8 : 8 + int.from_bytes(data[:8], "little")]
            (folder / family).write_bytes(b"\1" + data)
    if kind == "safetensors":
        entries = {
            "a": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]},
            "b": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]},
            "__metadata__": {"format": "pt"},
        }
        (folder / "small").write_bytes(b"\1" + json.dumps(entries).encode())
