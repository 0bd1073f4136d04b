#!/usr/bin/env bash
# mlx-lm 0.32.2 does not read rope_theta where transformers 5 writes it, inside "rope_parameters", for
# LLaMA: it uses its default of 10000 without a message. A folder that transformers 5.23.0 has saved then
# has other logits. With the same number also at the top level, the logits agree. (Its Qwen3 reads
# rope_parameters.)
#
# Seen: "rope_theta at the top level: False", "as saved: differs", "copied to the top level: equal".
# Fails if that changes. Linux, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" mlx-lm==0.32.2 \
  transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM

mx.set_default_device(mx.cpu)
torch.manual_seed(0)
rope = {"rope_type": "default", "rope_theta": 500000.0}
config = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters=rope,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
model.save_pretrained("model")
ids = [[3, 9, 27, 5, 40, 11]]
with torch.no_grad():
    expected = model(torch.tensor(ids)).logits.numpy()


def largest_difference():
    loaded, _ = load_model(Path("model"))
    logits = np.array(loaded(mx.array(ids)).astype(mx.float32))
    return np.abs(logits - expected).max()


path = Path("model/config.json")
saved = json.loads(path.read_text())
assert saved["rope_parameters"]["rope_theta"] == 500000.0
print("rope_theta at the top level:", "rope_theta" in saved)
before = largest_difference()
print("as saved:", "equal" if before < 1e-3 else "differs")
path.write_text(json.dumps(saved | {"rope_theta": 500000.0}))
after = largest_difference()
print("copied to the top level:", "equal" if after < 1e-3 else "differs")
assert "rope_theta" not in saved and before > 0.05 and after < 1e-3, (before, after)
PY
