"""Write seed corpora: DIRECTORY/fuzz_emulator, DIRECTORY/fuzz_kvm and DIRECTORY/fuzz_formats."""

import sys
from pathlib import Path

from emufuzz.case.json import case_to_json
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.libfuzzer.corpus import seed_corpus, write_cases

#: Seeds of the readers of bytes and of JSON.
_FORMATS = 64


def main(directory: Path) -> None:
    """Make all three."""
    seed_corpus(directory / "fuzz_emulator", CampaignConfig().setup())
    seed_corpus(directory / "fuzz_kvm", CampaignConfig(subject="kvm", paths=PATHS).setup())
    formats = directory / "fuzz_formats"
    for number in range(_FORMATS):
        write_cases(formats, generate_batch(1, number, 1))
    for name in ("alu", "system"):
        seeds = Path(__file__).parents[1] / "corpus" / "seeds" / f"{name}.jsonl"
        lines = seeds.read_bytes().splitlines()[:_FORMATS] if seeds.exists() else []
        for i, line in enumerate(lines):
            (formats / f"{name}-{i}.json").write_bytes(line)
    (formats / "case.json").write_bytes(case_to_json(generate_batch(1, 0, 1)[0])[:4096])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
