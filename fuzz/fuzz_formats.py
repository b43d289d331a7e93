"""libFuzzer target: the readers of cases, from bytes and from JSON."""

import sys

from emufuzz.fuzz.libfuzzer.instrument import instrument

instrument(("emufuzz.case",))  # before anything loads what is to be instrumented

from emufuzz.fuzz.libfuzzer.plain import check_formats, run  # noqa: E402

if __name__ == "__main__":
    run(sys.argv, check_formats)
