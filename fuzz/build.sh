#!/bin/bash -eu
# Builds the fuzz targets and their seed corpora into $OUT, in an image of OSS-Fuzz or ClusterFuzzLite
# (base-builder-python). Run in the checkout.
cd "$(dirname "$0")/.."

python3 -m pip install .

# Modules and libraries that are loaded by name, and so are not found by looking at imports.
packed=(
    --collect-submodules emufuzz
    --collect-all unicorn
    --collect-all capstone
    --copy-metadata unicorn
    --copy-metadata capstone
)
for target in fuzz/fuzz_*.py; do
    compile_python_fuzzer "$target" "${packed[@]}"
done

seeds=$(mktemp -d)
python3 fuzz/make_seeds.py "$seeds"
for corpus in "$seeds"/*; do
    (cd "$corpus" && zip -q -r "$OUT/$(basename "$corpus")_seed_corpus.zip" .)
done
rm -r "$seeds"
