"""Twenty steps as transformers and PEFT take them: the same losses, gradient norms and weights. A real model: goldens/train_parity.py."""

import numpy as np
import pytest
from golden_cases import FOLDER, MODELS
from parity import full_and_lora


@pytest.mark.parametrize(("scan_layers", "micro_batches"), [(True, 1), (False, 4)])
def test_as_transformers_and_peft(scan_layers, micro_batches):
    with np.load(FOLDER / "training.npz") as data:
        found = full_and_lora(MODELS / "llama_gqa", dict(data), scan_layers, micro_batches)
    for mode, apart in found.items():
        print(mode, apart)
        assert apart["loss"] <= 1e-4 and apart["grad_norm"] <= 1e-3 and apart["weights"] <= 1e-3 and apart["update"] <= 1e-2, (mode, apart)
