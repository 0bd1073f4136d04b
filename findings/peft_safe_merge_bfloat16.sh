#!/usr/bin/env bash
# PEFT 0.21.2: merge_and_unload(safe_merge=True) gives other weights than merge_and_unload() for a model
# in bfloat16 with an adapter in float32 (PEFT's default). The plain merge adds the float32 product to the
# weight and rounds once. The safe one rounds the product to bfloat16, adds, and rounds again.
#
# Seen: "plain merge: the sum rounded once", "safe merge: 8% of the weights differ from it".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 \
  transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import copy

import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).bfloat16()
weight = base[0].weight.detach().clone()
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=12, target_modules=["0"]))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.02 * torch.randn_like(parameter))
layer = model.base_model.model[0]
assert layer.lora_A["default"].weight.dtype == torch.float32
product = layer.get_delta_weight("default").detach()
once = (weight.float() + product).bfloat16()
plain = copy.deepcopy(model).merge_and_unload()[0].weight
safe = copy.deepcopy(model).merge_and_unload(safe_merge=True)[0].weight
different = (safe != once).float().mean().item()
print("plain merge:", "the sum rounded once" if torch.equal(plain, once) else "something else")
print(f"safe merge: {100 * different:.0f}% of the weights differ from it")
assert torch.equal(plain, once) and different > 0.05
PY
