#!/usr/bin/env bash
# PEFT 0.21.2: of the keys of alpha_pattern and rank_pattern that match a layer, the first in the dictionary counts,
# and save_pretrained sorts the keys of adapter_config.json. So an adapter can have other alphas after loading: with
# {"layers.0.k_proj": 4, "k_proj": 16}, the exception for layer 0 holds until the adapter is saved. Then "k_proj" is
# the first key, and layer 0 is scaled as the others. The same weights give other outputs, and nothing warns of it.
# (With rank_pattern, loading fails: the shapes differ.)
#
# Seen: "saved: layer 0 has scaling 0.5, layer 1 has 2.0", "loaded: layer 0 has scaling 2.0, layer 1 has 2.0",
# "same weights: True, same outputs: False, warnings: 0". Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 \
  transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PY' 2>/dev/null
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

folder = sys.argv[1] + "/adapter"


def base():
    torch.manual_seed(0)
    layers = [torch.nn.ModuleDict({"k_proj": torch.nn.Linear(8, 8)}) for _ in range(2)]
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    model.forward = lambda x: layers[1]["k_proj"](layers[0]["k_proj"](x))
    return model


def scaling(model):
    return [layer["k_proj"].scaling["default"] for layer in model.base_model.model.layers]


config = LoraConfig(
    r=8,
    target_modules=["k_proj"],
    alpha_pattern={"layers.0.k_proj": 4, "k_proj": 16},
    init_lora_weights=False,  # random, not zero
)
model = get_peft_model(base(), config).eval()
model.save_pretrained(folder)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), folder).eval()

for name, each in (("saved", model), ("loaded", loaded)):
    first, second = scaling(each)
    print(f"{name}: layer 0 has scaling {first}, layer 1 has {second}")
before, after = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
weights = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
x = torch.ones(1, 8)
outputs = torch.allclose(model(x), loaded(x), rtol=0.01)
print(f"same weights: {weights}, same outputs: {outputs}, warnings: {len(caught)}")
assert scaling(model) == [0.5, 2.0] and scaling(loaded) == [2.0, 2.0]
assert weights and not outputs and not caught
PY
