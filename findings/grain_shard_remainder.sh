#!/usr/bin/env bash
# grain 0.2.18: IndexSampler with drop_remainder=False (the default) loses the remainder of a sharded epoch. The
# documentation gives it to the first shards, one record each. They do own it, but each shard reads the same number
# of records, records * epochs / shards, rounded down. With 5 records in 2 shards, one epoch reads 4 of them, also
# shuffled, so that an evaluation misses one. Two epochs read record 3 three times, to fill the five of shard 1.
#
# Seen: "1 epoch: [0, 1] [3, 4]", "2 epochs: [0, 1, 2, 0, 1] [3, 4, 3, 4, 3]", "shuffled: 4 of 5 records".
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check grain==0.2.18
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import grain


def read(shard, **options):
    shards = grain.sharding.ShardOptions(shard_index=shard, shard_count=2)
    assert not shards.drop_remainder
    sampler = grain.samplers.IndexSampler(num_records=5, shard_options=shards, **options)
    return [int(x) for x in grain.DataLoader(data_source=range(5), sampler=sampler)]


seen = {}
for epochs in (1, 2):
    seen[epochs] = [read(shard, num_epochs=epochs) for shard in range(2)]
    print(f"{epochs} epoch{'s' * (epochs > 1)}:", *seen[epochs])
shuffled = [x for shard in range(2) for x in read(shard, num_epochs=1, shuffle=True, seed=0)]
print(f"shuffled: {len(set(shuffled))} of 5 records")
assert seen[1] == [[0, 1], [3, 4]] and len(set(shuffled)) == 4
assert seen[2] == [[0, 1, 2, 0, 1], [3, 4, 3, 4, 3]]
PY
