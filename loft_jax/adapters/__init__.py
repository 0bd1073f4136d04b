"""Adds low-rank adapters to Flax models, merges them, and exchanges them with other programs.

The optimizers do not need this package: they find the adapters of any library by their names.
"""

from loft_jax.adapters._cast import CastAdapter as CastAdapter
from loft_jax.adapters._cast import cast_factors as cast_factors
from loft_jax.adapters._families import FAMILIES as FAMILIES
from loft_jax.adapters._family import Family as Family
from loft_jax.adapters._gguf import load_gguf as load_gguf
from loft_jax.adapters._gguf import save_gguf as save_gguf
from loft_jax.adapters._hub import push_to_hub as push_to_hub
from loft_jax.adapters._hub import write_model_card as write_model_card
from loft_jax.adapters._linen import LoraModel as LoraModel
from loft_jax.adapters._linen import adapt as adapt
from loft_jax.adapters._load_into import load_into as load_into
from loft_jax.adapters._loaded import LoadedAdapter as LoadedAdapter
from loft_jax.adapters._loaded import LoraFactors as LoraFactors
from loft_jax.adapters._merged import save_merged as save_merged
from loft_jax.adapters._mlx import load_mlx as load_mlx
from loft_jax.adapters._mlx import save_mlx as save_mlx
from loft_jax.adapters._nnx import LoraLayer as LoraLayer
from loft_jax.adapters._nnx import add_lora as add_lora
from loft_jax.adapters._nnx import remove_lora as remove_lora
from loft_jax.adapters._nnx_layers import QuantizedLayer as QuantizedLayer
from loft_jax.adapters._nnx_layers import QuantizedParam as QuantizedParam
from loft_jax.adapters._peft import save_peft as save_peft
from loft_jax.adapters._peft_load import load_peft as load_peft
from loft_jax.adapters._quantize import quantize as quantize
from loft_jax.adapters._qwix import qwix_provider as qwix_provider
from loft_jax.adapters._renewal import Renewed as Renewed
from loft_jax.adapters._renewal import change_rank as change_rank
from loft_jax.adapters._renewal import renew as renew
from loft_jax.adapters._renewal import renew_model as renew_model
from loft_jax.adapters._rule import LoraRule as LoraRule
from loft_jax.adapters._rule import lora_pairs as lora_pairs
from loft_jax.adapters._servable import ServingProblem as ServingProblem
from loft_jax.adapters._servable import check_servable as check_servable
from loft_jax.adapters._trees import join as join
from loft_jax.adapters._trees import merge as merge
from loft_jax.adapters._trees import split as split
from loft_jax.adapters._trees import unmerge as unmerge
