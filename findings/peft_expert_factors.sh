#!/usr/bin/env bash
# PEFT 0.21.2: the two factors of an adapter on stacked experts (target_parameters) have different layouts. In
# lora_A (experts * r, in) the experts are outside, so expert e has the rows e*r to (e+1)*r. In lora_B
# (out, r * experts) they are inside, so it has the columns e, e + experts, e + 2*experts and so on. A reader that
# takes r adjacent columns has the right shapes and another model. The names say nothing of the parameters
# either: with gate_up_proj and down_proj the file has experts.base_layer and experts, the first parameter innermost.
#
# Seen: "inner columns: 0.0e+00, adjacent columns: 8.7e+00", and "experts.base_layer is gate_up_proj".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 \
  transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/adapter" <<'PY' 2>/dev/null
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
experts, rank = 3, 4
config = Qwen3MoeConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=8, intermediate_size=16,
                        moe_intermediate_size=8, num_experts=experts, num_experts_per_tok=2)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets)
model = get_peft_model(Qwen3MoeForCausalLM(config), lora)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
model.save_pretrained(sys.argv[1])
tensors = load_file(f"{sys.argv[1]}/adapter_model.safetensors")
names = {name.rpartition(".lora_A")[0]: name for name in tensors if "lora_A" in name}
inner = next(name for name in names if name.endswith("experts.base_layer"))
a, b = (tensors[f"{inner}.lora_{part}.weight"] for part in "AB")
wrapped = model.base_model.model.model.layers[0].mlp.experts
print("experts.base_layer is", wrapped.base_layer.parameter_name)
delta = wrapped.base_layer.get_delta_weight("default")[1]  # of expert 1: (out, in)
rows = a[rank : 2 * rank]
inside = (b[:, 1::experts] @ rows - delta).abs().max().item()
adjacent = (b[:, rank : 2 * rank] @ rows - delta).abs().max().item()
print(f"inner columns: {inside:.1e}, adjacent columns: {adjacent:.1e}")
assert wrapped.base_layer.parameter_name == "gate_up_proj" and inside < 1e-5 < 1 < adjacent
PY
