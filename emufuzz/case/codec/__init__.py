"""Cases as a few dozen bytes, for fuzzers that change bytes: any bytes are a case, any case is bytes.

`encode_case` and `decode_case` lose nothing; files of encoded cases are what libFuzzer's corpora hold.
"""

from emufuzz.case.codec.cases import VERSION, decode_case, encode_case

__all__ = ["VERSION", "decode_case", "encode_case"]
