"""libFuzzer target: the port of KVM's emulator alone, on flat memory, against Unicorn."""

import sys

from emufuzz.fuzz.libfuzzer.instrument import instrument

instrument()  # before anything loads what is to be instrumented

from emufuzz.fuzz.config import CampaignConfig  # noqa: E402
from emufuzz.fuzz.libfuzzer.plain import run_judged  # noqa: E402

if __name__ == "__main__":
    run_judged(sys.argv, CampaignConfig())
