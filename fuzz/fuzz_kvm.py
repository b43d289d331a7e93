"""libFuzzer target: the emulator inside the model of KVM, through every exit path, against Unicorn."""

import sys

from emufuzz.fuzz.libfuzzer.instrument import instrument

instrument()  # before anything loads what is to be instrumented

from emufuzz.case.paths import PATHS  # noqa: E402
from emufuzz.fuzz.config import CampaignConfig  # noqa: E402
from emufuzz.fuzz.libfuzzer.plain import run_judged  # noqa: E402

if __name__ == "__main__":
    run_judged(sys.argv, CampaignConfig(subject="kvm", paths=PATHS))
