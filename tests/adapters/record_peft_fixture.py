"""Records an adapter trained by Hugging Face PEFT, which `test_peft_files.py` reads without PEFT.

    pip install torch transformers peft
    python tests/adapters/record_peft_fixture.py

Writes `data/peft_llama/`, as PEFT's save_pretrained does, and `data/peft_llama.npz`: config,
weights of the base model, token ids, and the logits with and without the adapter.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "data" / "peft_llama"

_CONFIG = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Writes the files."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at the initialization, many errors would not show
            parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.half())  # so that the file can hold them in 16 bits
    arrays = {f"tensors/{name}": value.numpy().copy() for name, value in model.state_dict().items()}
    ids = torch.randint(0, _CONFIG["vocab_size"], (2, 24))
    with torch.no_grad():
        base_logits = model(ids).logits.numpy()
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=12,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"down_proj": 5},
            use_rslora=True,
            task_type="CAUSAL_LM",
        ),
    )
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        logits = adapted(ids).logits.numpy()
    adapted.save_pretrained(str(FOLDER))
    (FOLDER / "README.md").unlink()
    arrays.pop("tensors/lm_head.weight")  # tied
    np.savez_compressed(
        FOLDER.with_suffix(".npz"),
        config=json.dumps(model.config.to_dict()),
        ids=ids.numpy().astype(np.int32),
        base_logits=base_logits,
        logits=logits,
        **{name: value.astype(np.float16) for name, value in arrays.items()},
    )


if __name__ == "__main__":
    main()
