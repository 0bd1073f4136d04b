"""The parts that the example scripts share.

Data: `data/`, `batches.py`, `downloads.py`. Models: `models/`, `meshes.py`. A run: `settings.py`,
`config_files.py`, `methods.py`, `schedules.py`, `tasks.py`, `training.py`, `loop.py`,
`progress.py`, `answering.py`, `runs.py`, `trackers.py`, `figures.py`.
"""

import importlib.util

_PACKAGES = ("matplotlib", "PIL", "safetensors", "tokenizers", "tqdm")

if _missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    raise ImportError(
        f"The examples need {', '.join(_missing)}, which the extra `examples` contains: "
        'pip install -c constraints.txt -e ".[examples]"'
    )
