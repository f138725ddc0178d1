"""`python -m benchmarks.gpu.captioning`: images/s of a BLIP-large-sized captioner against its batch size, on a GPU.

Weights are random, as speed does not depend on them, and every sentence has exactly 30 new tokens. Measured are the
captioner of this repository in half precision, the one-at-a-time loop that it replaces (float32, as the released demo
runs, and half), and what decoding costs: reading a 144 x 288 JPEG crop and resizing it to the model's input on one
CPU, and turning a batch into the model's numbers. No Ray, nothing from a model hub. `--tiny` runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

from tvilfm.captioning.captioner import Captioner
from tvilfm.config import CaptionerSection
from tvilfm.data.pixels import decode

CROP_HEIGHT, CROP_WIDTH = 288, 144
RESULTS = Path(__file__).parent.parent / "results" / "gpu_caption.jsonl"
# Vision, text, tokens. `large` is Salesforce/blip-image-captioning-large; `small` has 1 % of its work.
SHAPES: dict[str, dict[str, Any]] = {
    "large": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "image_size": 384,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vocabulary": 30524,
        "tokens": 30,
    },
    "small": {
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
        "image_size": 128,
        "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4},
        "vocabulary": 4096,
        "tokens": 20,
    },
    "tiny": {
        "vision": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "image_size": 32,
        "text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "vocabulary": 64,
        "tokens": 4,
    },
}


def build_blip(size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Captioner:
    """A captioner of BLIP's architecture with random weights, which always writes its full number of tokens.

    Args:
        size: large, small or tiny.
        device: to write on.
        dtype: of the weights.
    """
    shape = SHAPES[size]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words += [f"word{i}" for i in range(shape["vocabulary"] - len(words))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        tokenizer = BertTokenizer(vocab=str(Path(folder) / "vocab.txt"))
    text = {
        **shape["text"],
        "vocab_size": shape["vocabulary"],
        "encoder_hidden_size": shape["vision"]["hidden_size"],
        "bos_token_id": 5,
        "eos_token_id": 2,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {**shape["vision"], "image_size": shape["image_size"], "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    model.text_decoder.generation_config.min_new_tokens = shape["tokens"]
    processor = BlipImageProcessor(size={"height": shape["image_size"], "width": shape["image_size"]})
    section = CaptionerSection(model=f"random BLIP, {size}", max_new_tokens=shape["tokens"])
    network: Any = model  # its types take a model for `to`
    return Captioner(section, network.to(device, dtype).eval(), None, processor, tokenizer, "random")


def crops(count: int) -> list[bytes]:
    """JPEG files of person-sized crops, smooth as photographs are."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (18, 9, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        patches.resize((CROP_WIDTH, CROP_HEIGHT), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def measure(size: str, device: str, batches: list[int], *, seconds: float) -> list[dict[str, Any]]:
    """One record a setting: images/s and where the time goes.

    Args:
        size: of the model.
        device: cpu or cuda.
        batches: batch sizes.
        seconds: that each is run for, at least.
    """
    half = torch.float16 if device == "cuda" else torch.float32
    files = crops(max(batches))
    records: list[dict[str, Any]] = []
    for dtype, of_dtype in ({torch.float32: [1]} | {half: batches}).items():
        captioner = build_blip(size, device=device, dtype=dtype)
        for batch in of_dtype:
            read = partial(_decoded, files[:batch], captioner.input_size)
            images = read()
            decode_s = _timed(read, device, seconds / 4)
            inputs_s = _timed(partial(captioner.prompt_inputs, images), device, seconds / 4)
            caption_s = _timed(partial(captioner.caption, images), device, seconds)
            records.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    "images_per_s": batch / (decode_s + caption_s),
                    "captioner_images_per_s": batch / caption_s,
                    "decode_images_per_s_per_cpu": batch / decode_s,
                    "decode_share": (decode_s + inputs_s) / (decode_s + caption_s),
                }
            )
    one: float = next(record["images_per_s"] for record in records if record["batch"] == 1)
    return [{**record, "times_one_at_a_time_float32": record["images_per_s"] / one} for record in records]


def _decoded(files: list[bytes], size: tuple[int, int] | None) -> list[npt.NDArray[np.uint8]]:
    height, width = size or (None, None)
    return [decode(file, height=height, width=width, name="crop") for file in files]


def _timed(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of a call: the mean over as many as fit, after a warm-up."""
    call()
    _wait(device)
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < seconds:
        call()
        _wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line a setting, and add the records to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does it run?")
    parser.add_argument("--out", type=Path, help="JSON lines file; default benchmarks/results, none with --tiny")
    chosen = parser.parse_args(arguments)
    if not chosen.tiny and not torch.cuda.is_available():
        raise SystemExit("gpu.captioning: expected a CUDA device, got none. Use --tiny to check that it runs.")
    torch.set_num_threads(1)  # decoding is stated for one CPU
    device = "cpu" if chosen.tiny else "cuda"
    machine = platform.processor() if chosen.tiny else torch.cuda.get_device_name()
    settings = ("tiny", device, [1, 2]) if chosen.tiny else ("large", device, [1, 8, 32, 64, 128, 256])
    records = measure(*settings, seconds=0.01 if chosen.tiny else 8.0)
    for record in records:
        print(
            f"{record['dtype']} batch {record['batch']}: {record['images_per_s']:.1f} images/s, "
            f"{record['times_one_at_a_time_float32']:.1f} times the one-at-a-time loop, "
            f"{100 * record['decode_share']:.1f} % of it decoding"
        )
    out = chosen.out or (None if chosen.tiny else RESULTS)
    if out:
        with out.open("a") as file:
            for record in records:
                file.write(json.dumps({"device": machine, "torch": torch.__version__, **record}) + "\n")


if __name__ == "__main__":
    main()
