#!/usr/bin/env bash
# tokenizers 0.23.3: the ByteFallback decoder decodes adjacent byte tokens together. If one character among
# them is incomplete, it replaces all of their bytes by "�", also the bytes of complete characters. LLaMA's
# newline is a byte token. So an answer that is cut inside an emoji loses the newlines and emoji next to it,
# and in a stream, text that was decoded disappears again. sentencepiece 0.2.3 replaces only the incomplete
# bytes.
#
# Seen for the last five prefixes of the tokens of "b\n😀":
#     tokenizers 'b\n' 'b��' 'b���' 'b����' 'b\n😀'
#     sentencepiece 'b\n' 'b\n�' 'b\n��' 'b\n���' 'b\n😀'
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
PYTHONIOENCODING=utf-8 "$folder/venv/bin/python" - <<'PY'
import io

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models

file = io.BytesIO()
SentencePieceTrainer.train(
    sentence_iterator=iter(["a b a b"] * 9),
    model_writer=file,
    model_type="bpe",
    vocab_size=262,
    byte_fallback=True,
    normalization_rule_name="identity",
    minloglevel=2,
)
sentencepiece = SentencePieceProcessor(model_proto=file.getvalue())
ids = sentencepiece.encode("b\n😀")
pieces = [sentencepiece.id_to_piece(n) for n in ids]
assert pieces[-5:] == ["<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], pieces

vocabulary = {sentencepiece.id_to_piece(n): n for n in range(len(sentencepiece))}
tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
tokenizer.decoder = decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)])
lengths = range(len(ids) - 4, len(ids) + 1)
found = [[decode(ids[:n]) for n in lengths] for decode in (tokenizer.decode, sentencepiece.decode)]
for name, texts in zip(("tokenizers", "sentencepiece"), found):
    print(name, *map(repr, texts))
assert found[0] == ["b\n", "b��", "b���", "b����", "b\n😀"]
assert found[1] == ["b\n", "b\n�", "b\n��", "b\n���", "b\n😀"]
# The same with a complete emoji before an incomplete one: the complete one is lost too.
assert tokenizer.decode([*ids, *ids[-4:-1]]) == "b" + 8 * "�"
PY
