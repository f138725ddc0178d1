"""The tokenizer and the text tower need two modules of open_clip, not the package."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from tvilfm.data.tokens import tokenize
from tvilfm.models.text_encoder import TextEncoder
features = TextEncoder(dim=8, width=16, layers=1, heads=2)(tokenize(["a man in a red coat"]))
assert features.shape == (1, 8)
print(*sorted({"open_clip", "transformers", "timm"} & set(sys.modules)))
import open_clip
assert callable(open_clip.create_model)
"""


def test_sentences_are_encoded_without_the_package_which_can_still_be_imported() -> None:
    shown = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
