"""Files that are no safetensors file, or a malformed one: bytes, kind of problem, and a word of the reason."""

from __future__ import annotations

import json

ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
TWO = ONE[:-1] + ',"b":{"dtype":"U8","shape":[2],"data_offsets":[7,9]}}'


def file(text: str | bytes, data: int = 0, length: int | None = None) -> bytes:
    """A file with this header, whatever it is, and ``data`` zero bytes behind it."""
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(name: str = "a", dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", data: int = 8) -> bytes:
    """A file with one tensor."""
    return file(f'{{{json.dumps(name)}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}', data)


BAD = "header-malformed"
CASES: dict[str, tuple[bytes, str, str]] = {
    "empty file": (b"", "empty-file", "is empty"),
    "one byte": (b"\1", "not-safetensors", "only 1 byte"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "not-safetensors", "only 7 bytes"),
    "eight zeros": (bytes(8), "not-safetensors", "no valid header"),
    "a length and nothing": (b"\x10" + bytes(7), "not-safetensors", "no valid header"),
    "random bytes": (bytes(range(7, 250)), "not-safetensors", "no valid header"),
    "starts with a space": (file(" " + ONE, 8), "not-safetensors", "no valid header"),
    "starts with a byte order mark": (file("\ufeff" + ONE, 8), "not-safetensors", "no valid header"),
    "a list": (file("[]"), "not-safetensors", "no valid header"),
    "a number": (file("1234"), "not-safetensors", "no valid header"),
    "header longer than the file": (file(ONE, length=1000), "truncated", "does not fit"),
    "header one byte longer": (file(ONE, length=len(ONE) + 1), "truncated", "does not fit"),
    "header of 100 MB and one": (file(ONE, length=100_000_001), BAD, "are allowed"),
    "header of a terabyte": (file(ONE, length=1 << 40), BAD, "are allowed"),
    "largest length": (file(ONE, length=(1 << 64) - 1), BAD, "are allowed"),
    "header one byte shorter": (file(ONE, 8, length=len(ONE) - 1), BAD, "comma or a brace"),
    "Git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git-lfs-pointer",
        "lfs",
    ),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle", "qz does not load it"),
    "pickle": (b"\x80\x02}q\0." + bytes(60), "pickle", "qz does not load it"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(60), "gguf", "GGUF"),
    "web page": (b"<!DOCTYPE html><html>", "not-safetensors", "web page"),
    "error in JSON": (b'{"error":"Repository not found"}', "not-safetensors", "no valid header"),
    # Strings and names
    "tensor twice": (file(ONE[:-1] + "," + ONE[1:], 8), BAD, "twice"),
    "tensor twice, once escaped": (file(ONE[:-1] + ',"\\u0061"' + ONE[4:], 8), BAD, "twice"),
    "name with NUL": (entry("a\0"), BAD, "control"),
    "name with a raw newline": (file(ONE.replace("a", "a\n", 1), 8), BAD, "control"),
    "name with ESC": (entry("\x1b[31m"), BAD, "control"),
    "name with C1": (entry("\x9b31m"), BAD, "control"),
    "name with DEL": (entry("a\x7f"), BAD, "control"),
    "name with bidi": (entry("\u202egpj"), BAD, "control"),
    "name with an isolate": (entry("\u2066a"), BAD, "control"),
    "name with a line separator": (entry("a\u2028"), BAD, "control"),
    "name with half a surrogate": (file('{"\\ud800":' + ONE[5:], 8), BAD, "Unicode"),
    "name too long": (entry("é" * 513), BAD, "too long"),
    "name empty": (entry(""), BAD, "empty"),
    "name not UTF-8": (file(b'{"\xff":' + ONE[5:].encode(), 8), BAD, "UTF-8"),
    "name in CESU-8": (file(b'{"\xed\xa0\x80":' + ONE[5:].encode(), 8), BAD, "UTF-8"),
    "name with an unknown escape": (file('{"\\x41":' + ONE[5:], 8), BAD, "valid UTF-8 JSON"),
    "name without an end": (file('{"aaa'), BAD, "no end"),
    "name without quotes": (file("{a:1}"), BAD, "string is missing"),
    "name in single quotes": (file("{'a':1}"), BAD, "string is missing"),
    # Metadata
    "metadata twice": (file('{"__metadata__":{},"__metadata__":{}}'), BAD, "twice"),
    "metadata key twice": (file('{"__metadata__":{"a":"","a":""}}'), BAD, "twice"),
    "metadata null": (file('{"__metadata__":null}'), BAD, "not an object"),
    "metadata list": (file('{"__metadata__":[]}'), BAD, "not an object"),
    "metadata string": (file('{"__metadata__":"pt"}'), BAD, "not an object"),
    "metadata number": (file('{"__metadata__":{"a":1}}'), BAD, "not a string"),
    "metadata null value": (file('{"__metadata__":{"a":null}}'), BAD, "not a string"),
    "metadata nested": (file('{"__metadata__":{"a":{}}}'), BAD, "not a string"),
    "metadata with a control character": (file('{"__metadata__":{"a\n":""}}'), BAD, "string"),
    "metadata as a tensor": (entry("__metadata__"), BAD, "not a string"),
    # Shapes and numbers
    "17 dimensions": (entry(shape=str([1] * 17), offsets="[0,4]", data=4), BAD, "17 dimensions"),
    "100,000 dimensions": (entry(shape=str([1] * 100_000), offsets="[0,4]", data=4), BAD, "valid JSON"),
    "negative extent": (entry(shape="[-2]"), BAD, "negative"),
    "minus nought": (entry(shape="[-0]", offsets="[0,0]", data=0), BAD, "negative"),
    "fraction": (entry(shape="[2.0]"), BAD, "whole numbers"),
    "exponent": (entry(shape="[2e0]"), BAD, "whole numbers"),
    "truth value": (entry(shape="[true]"), BAD, "whole numbers"),
    "text as an extent": (entry(shape='["2"]'), BAD, "whole numbers"),
    "null shape": (entry(shape="null"), BAD, "whole numbers"),
    "number as a shape": (entry(shape="2"), BAD, "whole numbers"),
    "nested shape": (entry(shape="[[2]]"), BAD, "whole numbers"),
    "NaN": (entry(shape="[NaN]"), BAD, "NaN"),
    "Infinity": (entry(shape="[Infinity]"), BAD, "Infinity"),
    "leading nought": (entry(shape="[02]"), BAD, "valid JSON"),
    "hexadecimal": (entry(shape="[0x2]"), BAD, "valid JSON"),
    "overflow": (entry(shape="[4294967296,4294967296,0]", offsets="[0,0]", data=0), BAD, "large"),
    "beyond 64 bits": (entry(shape="[18446744073709551616]"), BAD, "whole numbers"),
    "number of 5,000 digits": (entry(shape="[" + "9" * 5000 + "]"), BAD, "too large"),
    # Fields
    "unknown dtype": (entry(dtype="F31"), BAD, "unknown dtype"),
    "dtype in small letters": (entry(dtype="f32"), BAD, "unknown dtype"),
    "dtype with ESC": (entry(dtype="\\u001b[2J"), BAD, "unknown dtype"),
    "dtype of torch": (entry(dtype="torch.float32"), BAD, "unknown dtype"),
    "dtype a number": (file('{"a":{"dtype":1,"shape":[2],"data_offsets":[0,8]}}', 8), BAD, "not a string"),
    "extra field": (file(ONE[:-2] + ',"x":1}}', 8), BAD, "exactly"),
    "no shape": (file('{"a":{"dtype":"F32","data_offsets":[0,8]}}', 8), BAD, "exactly"),
    "no dtype": (file('{"a":{"shape":[2],"data_offsets":[0,8]}}', 8), BAD, "exactly"),
    "no offsets": (file('{"a":{"dtype":"F32","shape":[2]}}', 8), BAD, "exactly"),
    "no field": (file('{"a":{}}'), BAD, "exactly"),
    "field twice": (file(ONE[:-2] + ',"dtype":"F32"}}', 8), BAD, "twice"),
    "tensor null": (file('{"a":null}'), BAD, "object"),
    "tensor a list": (file('{"a":["F32",[2],[0,8]]}', 8), BAD, "object"),
    # Offsets
    "half a byte": (entry(dtype="F4", shape="[3]", offsets="[0,1]", data=1), BAD, "fill"),
    "too short for its shape": (entry(shape="[3]"), BAD, "does not fill"),
    "too long for its shape": (entry(shape="[1]"), BAD, "does not fill"),
    "scalar without bytes": (entry(shape="[]", offsets="[0,0]", data=0), BAD, "does not fill"),
    "offsets backwards": (entry(offsets="[8,0]"), BAD, "does not fill"),
    "one offset": (entry(offsets="[8]"), BAD, "two whole numbers"),
    "three offsets": (entry(offsets="[0,4,8]"), BAD, "two whole numbers"),
    "negative offset": (entry(offsets="[-8,0]"), BAD, "negative"),
    "hole at the start": (entry(offsets="[4,12]", data=12), BAD, "hole"),
    "hole between": (file(TWO.replace("[7,9]", "[9,11]"), 11), BAD, "hole"),
    "overlap": (file(TWO, 9), BAD, "overlaps"),
    "the same bytes twice": (file(ONE[:-1] + "," + ONE[1:].replace("a", "b", 1), 8), BAD, "overlaps"),
    "trailing byte": (file(ONE, 9), BAD, "follow"),
    "trailing bytes and no tensor": (file("{}", 9), BAD, "follow"),
    "missing byte": (file(ONE, 7), "truncated", "missing"),
    "no data": (file(ONE), "truncated", "missing"),
    "offset beyond any file": (entry(shape="[1099511627776]", offsets="[0,4398046511104]"), "truncated", "missing"),
    # Punctuation
    "text behind the header": (file(ONE + "x", 8), BAD, "closing brace"),
    "NUL padding": (file(ONE + "\0\0", 8), BAD, "closing brace"),
    "second object": (file(ONE + "{}", 8), BAD, "closing brace"),
    "brace only": (file("{ "), BAD, "string is missing"),
    "no end": (file('{"a":'), BAD, "object"),
    "comma at the end": (file('{"__metadata__":{},}'), BAD, "string"),
    "comma at the start": (file('{,"__metadata__":{}}'), BAD, "string"),
    "no comma": (file('{"__metadata__":{} "a":{}}'), BAD, "comma"),
    "no colon": (file('{"a"{}}'), BAD, "colon"),
    "comment": (file('{/**/"__metadata__":{}}'), BAD, "string"),
    "nested objects": (file('{"a":' * 3000), BAD, "JSON"),
    "nested lists": (file('{"a":{"shape":' + "[" * 3000), BAD, "JSON"),
}
