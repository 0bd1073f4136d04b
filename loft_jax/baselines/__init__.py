"""Baselines: the methods that LoFT is compared with, on the same `LoraPairs`.

Optimizers: `lora_plus`, `scaled_adamw` and `scaled_sgd` (Riemannian preconditioning), `lora_fa`,
`altlora`, `altlora_plus`, `lora_pro`, `lora_rite`, `adalora`. Adapters: `rslora_scale`,
`pissa_init`, `lora_ga_init`, `dora_init`, `dora_weight`, `dora_output`, `orthogonality_penalty`.
They follow their papers. Where the released code differs, the docstring states the difference and
the choice.
"""

from loft_jax.baselines._adalora import AdaloraState as AdaloraState
from loft_jax.baselines._adalora import adalora as adalora
from loft_jax.baselines._adalora import orthogonality_penalty as orthogonality_penalty
from loft_jax.baselines._altlora import ScaleByAltLoraState as ScaleByAltLoraState
from loft_jax.baselines._altlora import altlora as altlora
from loft_jax.baselines._altlora import altlora_plus as altlora_plus
from loft_jax.baselines._altlora import scale_by_altlora as scale_by_altlora
from loft_jax.baselines._budget import budget_schedule as budget_schedule
from loft_jax.baselines._dora import dora_init as dora_init
from loft_jax.baselines._dora import dora_output as dora_output
from loft_jax.baselines._dora import dora_weight as dora_weight
from loft_jax.baselines._initialization import LoraInit as LoraInit
from loft_jax.baselines._initialization import lora_ga_init as lora_ga_init
from loft_jax.baselines._initialization import pissa_init as pissa_init
from loft_jax.baselines._initialization import rslora_scale as rslora_scale
from loft_jax.baselines._lora_plus import lora_plus as lora_plus
from loft_jax.baselines._lora_pro import ScaleByLoraProState as ScaleByLoraProState
from loft_jax.baselines._lora_pro import lora_pro as lora_pro
from loft_jax.baselines._lora_pro import scale_by_lora_pro as scale_by_lora_pro
from loft_jax.baselines._lora_rite import ScaleByLoraRiteState as ScaleByLoraRiteState
from loft_jax.baselines._lora_rite import lora_rite as lora_rite
from loft_jax.baselines._lora_rite import scale_by_lora_rite as scale_by_lora_rite
from loft_jax.baselines._preconditioned import lora_fa as lora_fa
from loft_jax.baselines._preconditioned import precondition_by_partner as precondition_by_partner
from loft_jax.baselines._preconditioned import scaled_adamw as scaled_adamw
from loft_jax.baselines._preconditioned import scaled_sgd as scaled_sgd
from loft_jax.baselines._triplets import DEFAULT_VALUES as DEFAULT_VALUES
