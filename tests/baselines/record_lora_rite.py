"""Records the path of LoRA-RITE in the pytorch-optimizer package, for `test_optimizers.py`.

    pip install torch==2.13.0 pytorch-optimizer==4.1.0
    PYTHONPATH=tests python tests/baselines/record_lora_rite.py

Writes `data/lora_rite.npz`: the weights after each step, with and without escaped mass. Clipping
and skipping, which the paper does not have, are off.
"""

from pathlib import Path

import numpy as np
from oracles import Problem

FILE = Path(__file__).parent / "data" / "lora_rite.npz"
PROBLEM = Problem(9, 6, 3, seed=1)
STEPS, LR, B2, EPS, DECAY = 12, 0.02, 0.9, 1e-6, 0.1


def main() -> None:
    """Writes the file."""
    import torch
    from pytorch_optimizer import LoRARite

    paths = {}
    for escaped in (True, False):
        # The package's pairs are (r, in) and (out, r).
        u, v = (torch.tensor(x) for x in (PROBLEM.u.T.copy(), PROBLEM.v.copy()))
        options = {"clip_unmagnified_grad": 0.0, "update_skipping": 0.0, "weight_decay": DECAY}
        tx = LoRARite([u, v], lr=LR, betas=(0.9, B2), eps=EPS, apply_escape=escaped, **options)
        path = []
        for k in range(STEPS):
            g = PROBLEM.gradient(PROBLEM.weight(u.numpy().T, v.numpy()), k)
            u.grad, v.grad = torch.tensor((g @ v.numpy()).T), torch.tensor(g.T @ u.numpy().T)
            tx.step()
            path.append(PROBLEM.weight(u.numpy().T, v.numpy()))
        paths["escaped" if escaped else "plain"] = np.stack(path)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **paths)


if __name__ == "__main__":
    main()
