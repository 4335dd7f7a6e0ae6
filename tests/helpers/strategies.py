"""An ES over a small random model."""

from checkpoints import random_params

from rwkv_es.es.strategy import ES
from rwkv_es.model.forward import Model
from rwkv_es.pretrained.checkpoint import Arch

ARCH = Arch(2, 64, 1, 64, 32, 256, 8, 8, 8, 8)


def make(**options):
    return ES(Model(random_params(2, 64, 32, 0), ARCH), **{"population": 6, "sigma": 0.01, "lr": 0.1, **options})
