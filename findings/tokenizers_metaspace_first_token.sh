#!/usr/bin/env bash
# tokenizers 0.23.3: the Metaspace decoder removes every "▁" of the first token, not only the one that
# it put before the text. With split=False a token can have spaces inside, as in "▁a▁b", and decoding
# then loses those of the first token. The decoder of LLaMA's tokenizer.json (Replace, Fuse, Strip)
# keeps them.
#
# Seen: tokens ['▁a▁b', '▁a▁b'] of "a b a b" decode to 'ab a b', and with Replace to 'a b a b'.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pieces = ["a", "▁", "b", "a▁", "a▁b", "▁a▁b"]
merges = [("a", "▁"), ("a▁", "b"), ("▁", "a▁b")]
tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
options = {"prepend_scheme": "first", "split": False}
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
encoding = tokenizer.encode("a b a b")
print(encoding.tokens)
assert encoding.tokens == ["▁a▁b", "▁a▁b"]

tokenizer.decoder = decoders.Metaspace(**options)
joined = tokenizer.decode(encoding.ids)
llama = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
tokenizer.decoder = decoders.Sequence(llama)
kept = tokenizer.decode(encoding.ids)
print(repr(joined), repr(kept))
assert (joined, kept) == ("ab a b", "a b a b")
PY
