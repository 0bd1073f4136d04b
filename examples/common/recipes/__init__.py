"""The experiments of the paper as data; `recipes.py` prints and runs them."""
