"""The parts that the example scripts share.

Data: `data/`, `batches.py`, `downloads.py`. Models: `models/`, `meshes.py`. A run: `settings.py`,
`methods.py`, `tasks.py`, `training.py`, `loop.py`, `runs.py`, `figures.py`.
"""
