"""The code of docs/decoders.md, on a tiny decoder; its last block in a process without fastspec."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from glue_support import word_tokenizer
from tiny_models import llama

from fastspec.studies.decoder.text import texts

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parent.parent / "docs" / "decoders.md"
CHECK = """
import sys
assert not [name for name in sys.modules if name.startswith("fastspec")]
assert difference < 1e-4, difference
torch.save(merged(ids).logits, "logits.pt")
"""


def test_the_code_runs_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = Counter(word for text in texts()[0][:300] for word in re.findall(r"\w+", text))
    tokenizer = word_tokenizer([word for word, _ in words.most_common(100)])
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained("path/to/decoder")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.3}
    llama(vocab_size=len(tokenizer), **sizes).save_pretrained("path/to/decoder")

    *blocks, last = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    mixed, alone, prompts = names["mixed"], names["alone"], names["prompts"]
    assert mixed.shape == alone.shape
    assert torch.equal(mixed[0], alone[0]), "the task's row is the task's"
    plain = type(names["plain"]).from_pretrained("path/to/decoder").eval()
    with torch.inference_mode():
        without = plain.generate(**prompts, max_new_tokens=12, do_sample=False)
    assert torch.equal(mixed[1], without[1]), "None is the pretrained model"
    assert not torch.equal(without[0], alone[0])

    run = subprocess.run([sys.executable, "-c", last + CHECK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.inference_mode():
        before = plain(torch.arange(10).reshape(1, 10)).logits
    assert not torch.allclose(torch.load("logits.pt"), before, atol=1e-3)
