"""What this machine's linear algebra library keeps to: asked once, so that tests of last bits skip where it does not."""

import os
from functools import cache, reduce
from pathlib import Path

import torch
from checkpoints import random_params

from rwkv_es import load_model
from rwkv_es.model.batch import MULTIPLES, Verdict, advice, examine
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import infer


@cache
def verdict():
    """Judge the shapes that the tests use, in both engines, with as many threads."""
    params = random_params(2, 128, 64)
    models = (load_model("tiny")[0], Model(params, infer(Path("made.pth"), params)))
    torch.set_num_threads(1)
    return reduce(
        Verdict.joined,
        (
            examine(model, 256, threads, is_fused=fused)
            for model in models
            for threads, fused in ((1, False), (2, True))
        ),
    )


def reason(marker):
    """Return why a test with this marker cannot hold on this machine; "" if it can."""
    found, mode = verdict(), f"MKL_CBWR={os.environ.get('MKL_CBWR', 'unset')}"
    if text := advice(found):
        return f"{mode}: {text}"
    if marker == "bits" and found.multiple > MULTIPLES[0]:
        return f"{mode}: products of this machine need multiples of {found.multiple} rows"
    return ""
