"""Checks a wheel's contents: one native library, the trained models, nothing that does not belong."""

import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
native = [name for name in names if name.endswith(".so")]
assert len(native) == 1 and native[0].startswith("shiva_ext/_C"), f"wanted one native library, got {native}"
for wanted in (
    *("dense/transformer/config.json", "shiva60/shiva.safetensors", "classifier/classifier.safetensors"),
    *("emoji_dense/transformer/config.json", "emoji60/shiva.safetensors", "emoji_classifier/classifier.json"),
):
    assert f"shiva_ext/testbed/assets/{wanted}" in names, f"the wheel lacks {wanted}"
stray = [name for name in names if not name.startswith(("shiva_ext/", "shiva_ext-"))]
assert not stray, f"the wheel holds files outside the package: {stray[:3]}"
print(f"{sys.argv[1]}: {len(names)} files, native library {native[0]}")
